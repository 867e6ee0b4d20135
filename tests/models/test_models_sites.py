"""record and intervene on any module; recording with gradients on a language model."""

from collections import namedtuple

import pytest
import torch
from torch import nn

import saelab
from saelab.base.errors import InterventionError, SiteError
from saelab.models.hooks import first_runs
from saelab.models.sites import intervene, record, run_recording
from tests import tiny

Pair = namedtuple("Pair", "first second")


class Block(nn.Module):
    """Gives a tuple, a named tuple or a dict, and counts its calls."""

    def __init__(self, form):
        super().__init__()
        self.form, self.calls, self.inner = form, 0, nn.Linear(4, 4)

    def forward(self, x=None, scale=1.0):
        self.calls += 1
        y = self.inner(x) * scale
        return {"tuple": (y, None), "list": [None, y], "named": Pair(y, 2), "dict": {"n": 1, "y": y}}[self.form]


class Net(nn.Module):
    def __init__(self, form="tuple"):
        super().__init__()
        self.one, self.two = Block(form), Block(form)

    def forward(self, x):
        def tensor(output):
            values = output.values() if isinstance(output, dict) else output
            return next(v for v in values if isinstance(v, torch.Tensor))

        return tensor(self.two(x=tensor(self.one(x))))


def hooks_of(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("form", ["tuple", "list", "named", "dict"])
def test_record_and_intervene_whatever_the_container(form):
    net, x = Net(form), torch.randn(3, 4)
    found = record(net, ["one", "two.input", "two"], x)
    assert torch.equal(found["one"], found["two.input"])
    assert torch.equal(found["two"], net(x))
    for path in ("one", "two.input"):  # a positional and a keyword argument
        with intervene(net, path, lambda a, where: a * 0):
            assert torch.equal(net(x), net.two.inner.bias.expand(3, 4))
    with intervene(net, "one.input", lambda a, where: a + 1):
        changed = net(x)
    assert torch.equal(changed, net(x + 1))
    assert hooks_of(net) == 0


def test_where_is_the_call_of_the_outer_module():
    net, x, seen = Net(), torch.randn(3, 4), []
    with intervene(net, "two.inner", lambda a, where: seen.append(where) or a):
        net(x)
    assert seen[0].args[0] is x and seen[0].kwargs == {}
    with intervene(net, "two.inner", lambda a, where: seen.append(where) or a, locate=lambda args, kwargs: len(args)):
        net(x)
    assert seen[1] == 1


def test_recording_stops_after_the_last_site():
    net = Net()
    record(net, ["one", "one.inner"], torch.randn(2, 4))
    assert (net.one.calls, net.two.calls) == (1, 0)
    assert hooks_of(net) == 0


def test_recording_keeps_its_values_when_later_modules_write_in_place():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    x = torch.randn(5, 3)
    found = record(net, ["0", "2"], x)
    assert torch.equal(found["0"], net[0](x))


def test_nested_interventions_act_from_the_outside_in():
    net, x = nn.Sequential(nn.Identity()), torch.full((1, 1), 3.0)
    with intervene(net, "0", lambda a, where: a + 1), intervene(net, "0", lambda a, where: a * 2):
        assert net(x).item() == 8.0


def test_the_outer_module_is_a_site_too():
    net = nn.Sequential(nn.Identity())
    with intervene(net, "", lambda a, where: a * where.args[0].numel()):
        assert net(torch.ones(4)).tolist() == [4.0] * 4


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception(error):
    net = Net()

    def fail(a, where):
        raise error("stop")

    with pytest.raises(error), intervene(net, "one", fail):
        net(torch.randn(1, 4))
    with pytest.raises(error):
        first_runs({"one": (net.one, "output")}, lambda: (_ for _ in ()).throw(error("stop")))
    assert hooks_of(net) == 0


@pytest.mark.parametrize("path", ["one.iner", "inner", "one.inner.inputs"])
def test_an_unknown_path_lists_near_names(path):
    with pytest.raises(SiteError, match=r"one\.inner"):
        record(Net(), path, torch.randn(1, 4))


def test_a_path_that_never_runs_is_an_error():
    net = Net()
    net.unused = nn.Linear(4, 4)
    with pytest.raises(SiteError, match="never ran unused"):
        record(net, ["one", "unused"], torch.randn(1, 4))


@pytest.mark.parametrize(("result", "message"), [(None, "return"), (torch.zeros(2), "keep the shape")])
def test_an_intervention_gives_a_tensor_of_the_same_shape(result, message):
    net = Net()
    with pytest.raises(InterventionError, match=message), intervene(net, "one", lambda a, where: result):
        net(torch.randn(1, 4))


def test_the_language_model_stops_after_the_last_site(tiny_llama):
    calls = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(tiny_llama.model.model.layers)
    ]
    tiny_llama.record("some text", ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"])
    for handle in handles:
        handle.remove()
    assert calls == [0, 1]
    assert hooks_of(tiny_llama.model) == 0


SITES = ("blocks.1.hook_resid_mid", "blocks.2.attn.hook_z", "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre")


def test_gradients_are_those_of_the_summed_loss(tiny_tokenizer):
    lm = saelab.load_model(tiny.gpt2_model().double(), tokenizer=tiny_tokenizer, device="cpu")
    tokens = lm.tokenize(["The state of the union", "My fellow"])
    sites = [lm.site(name) for name in SITES]
    values, gradients = run_recording(lm, tokens, sites, gradients=True)
    direction = torch.randn(24, dtype=torch.float64)
    for name in SITES:
        plain = lm.record(tokens, name)
        assert torch.equal(values[name], plain)
        for row, position in ((0, 3), (1, 5), (1, 8)):
            losses = []
            for step in (1e-6, -1e-6):

                def nudge(x, where, row=row, position=position, step=step):
                    x = x.clone()
                    x[row, position] += step * direction
                    return x

                with lm.intervene(name, nudge):
                    losses.append(lm.loss(tokens, "sum").item())
            slope = (losses[0] - losses[1]) / 2e-6
            assert gradients[name][row, position] @ direction == pytest.approx(slope, abs=1e-4)
    assert torch.equal(gradients["blocks.1.hook_resid_post"], gradients["blocks.2.hook_resid_pre"])
    assert gradients["blocks.1.hook_resid_post"][:, -1].abs().max() == 0  # no target after the last token
    assert gradients["blocks.1.hook_resid_post"][1, 9:].abs().max() == 0  # nor in the padding


def test_gradients_do_not_depend_on_the_batch_nor_touch_the_parameters(tiny_llama):
    lm = tiny_llama
    frozen = lm.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = [p.requires_grad for p in lm.model.parameters()]
    sites = [lm.site("blocks.2.hook_resid_post")]
    ids = torch.randint(0, 250, (3, 12))
    with torch.no_grad():  # whatever mode the caller is in
        _, together = run_recording(lm, lm.to_tokens(ids), sites, gradients=True)
    _, alone = run_recording(lm, lm.to_tokens(ids[1]), sites, gradients=True)
    name = sites[0].name
    torch.testing.assert_close(together[name][1:2], alone[name], atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in lm.model.parameters())
    assert [p.requires_grad for p in lm.model.parameters()] == before
    frozen.requires_grad_(True)
    assert not together[name].requires_grad


def test_flags_come_back_after_an_error(tiny_llama):
    lm = tiny_llama
    with pytest.raises(KeyboardInterrupt), lm.intervene("blocks.3.hook_mlp_out", lambda x, where: (_ for _ in ()).throw(
            KeyboardInterrupt())):  # fmt: skip
        run_recording(lm, lm.tokenize("abc"), [lm.site("blocks.2.hook_resid_post")], gradients=True)
    assert all(p.requires_grad for p in lm.model.parameters())
    assert hooks_of(lm.model) == 0
