"""Files from others: whatever stands in a folder, reading it gives what was saved or an error that says what is wrong."""

import hashlib
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import saelab
from saelab import ConfigError, FormatError
from saelab.base import manifests
from saelab.base.manifests import COUNT, FLOATS, NUMBER, TEXT, check, fit


@pytest.fixture
def saved(tmp_path):
    sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), 8, {"site": "blocks.0.hook_resid_post"})
    sae.save(tmp_path / "sae")
    return tmp_path / "sae"


def rewrite(folder, change=None, **tensors):
    """Change cfg.json and the tensors of its files, with new checksums: only the schema can tell."""
    config = json.loads((folder / "cfg.json").read_text())
    ours = config["metadata"]["saelab"]
    for name, edit in tensors.items():
        path = folder / f"{name}.safetensors"
        content = load_file(path)
        edit(content)
        save_file(content, path)
        data = path.read_bytes()
        ours["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if change is not None:
        change(config, ours)
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config, ours: ours.update(files=None), "files is None, not a table"),
        (lambda config, ours: ours.update(files={}), "files has no entry 'sae_weights.safetensors'"),
        (lambda config, ours: ours["files"].pop("saelab.safetensors"), "no entry 'saelab.safetensors'"),
        (lambda config, ours: ours["files"].update(x=3), "files.x is 3, not a table"),
        (lambda config, ours: ours.update(config=[1]), "config is .1., not a table"),
        (lambda config, ours: ours["config"].update({"class": ["TopK"]}), "describes no architecture"),
        (lambda config, ours: ours["config"].update(k="two"), "k"),
        (lambda config, ours: ours["config"].update(k=3), "contradicts itself.*k is 2 and 3"),
        (lambda config, ours: ours["config"].update(d_sae=10**11), "W_enc is float32 .8, 16.*100000000000"),
        (lambda config, ours: config.update(d_sae=10**8), "contradicts itself.*d_sae is 100000000 and 16"),
        (lambda config, ours: config.update(d_in=True), "d_in is True, not a whole number"),
        (lambda config, ours: config.update(dtype="float16"), "dtype is 'float16' and 'float32'"),
        (lambda config, ours: ours["metadata"].update(context_length="long"), "context_length is 'long'"),
        (lambda config, ours: ours.update(format=2), "another version of saelab.*format is 2, not 1"),
        (lambda config, ours: config.update(metadata=None), "metadata is None, not a table"),
    ],
)  # fmt: skip
def test_a_changed_configuration_is_named(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(FormatError, match=message):
        saelab.SAE.load(saved)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("sae_weights", lambda t: t.pop("W_dec"), "lacks W_dec"),
        ("sae_weights", lambda t: t.update(more=torch.zeros(1)), "has also more"),
        ("sae_weights", lambda t: t["W_dec"][0].fill_(torch.nan), "W_dec holds NaN"),
        ("sae_weights", lambda t: t["b_enc"][0].fill_(torch.inf), "b_enc holds NaN or infinite"),
        ("sae_weights", lambda t: t.update(b_dec=torch.zeros(8, dtype=torch.int64)), "b_dec is int64"),
        ("saelab", lambda t: t["state.scale"].fill_(0), "scale is 0 and must be above 0"),
        ("saelab", lambda t: t["state.target_scale"].fill_(-1), "target_scale is -1 and must be above 0"),
        ("saelab", lambda t: t["state.scale"].fill_(torch.nan), "scale is nan and must be above 0"),
        ("saelab", lambda t: t["state.norm_limit"].fill_(torch.nan), "norm_limit is nan"),
        ("saelab", lambda t: t["state.fires"][0].fill_(-1), "fires counts -1"),
        ("saelab", lambda t: t.update({"state.fires": torch.zeros(17, dtype=torch.int64)}), "fires is int64 .17."),
        ("saelab", lambda t: t.pop("state.act_max"), "lacks state.act_max"),
    ],
)  # fmt: skip
def test_changed_tensors_are_named(saved, file, change, message):
    rewrite(saved, **{file: change})
    with pytest.raises(FormatError, match=message):
        saelab.SAE.load(saved)


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../outside", "a/../../outside", "C:\\x", "\\\\host\\x", "..\\outside", ""]
)
def test_no_name_leads_out_of_the_folder(saved, name):
    entry = {"bytes": 0, "sha256": "0" * 64}
    rewrite(saved, lambda config, ours: ours["files"].update({name: entry}))
    with pytest.raises(FormatError, match="not inside it"):
        saelab.SAE.load(saved)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "dangling"])
@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors", "saelab.safetensors"])
def test_only_plain_files_are_opened(saved, kind, name):
    path = saved / name
    path.unlink()
    make = {
        "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path), "dangling": lambda: path.symlink_to(saved / "nowhere"),
    }  # fmt: skip
    make[kind]()
    signal.alarm(10)  # without a handler: whoever opens a pipe is ended
    with pytest.raises(FormatError, match=name):
        saelab.SAE.load(saved)
    signal.alarm(0)


def test_a_link_to_a_plain_file_is_one(saved, tmp_path):
    elsewhere = tmp_path / "weights"
    (saved / "sae_weights.safetensors").rename(elsewhere)
    (saved / "sae_weights.safetensors").symlink_to(elsewhere)
    assert saelab.SAE.load(saved).d_sae == 16


def test_a_file_without_permission_is_named(saved, monkeypatch):
    def closed(path, *rest, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(FormatError, match=r"cfg.json cannot be read: Permission denied. Change its permissions"):
        saelab.SAE.load(saved)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[" * 100_000, "1" * 5000, "\xff\xfe\x00", ""])
def test_json_that_is_none(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin1"))
    with pytest.raises(FormatError, match="a.json"):
        manifests.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("value", [True, -1, 1.0, "1", None, 2**63])
def test_a_count_is_a_whole_number(value):
    with pytest.raises(FormatError, match=r"x: a\[0\].n is "):
        check({"a": [{"n": value}]}, {"a": [{"n": COUNT}]}, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True])
def test_a_number_is_finite(value):
    with pytest.raises(FormatError, match="not a finite number"):
        check(value, NUMBER, "x")


def test_tables_may_leave_out_and_have_more():
    schema = {"a": TEXT, "b?": COUNT, "*": TEXT}
    check({"a": "x", "c": "y"}, schema, "x")
    for value, message in (({}, "no entry 'a'"), ({"a": "x", "b": "y"}, "b is 'y'"), ({"a": "x", "c": 1}, "c is 1")):
        with pytest.raises(FormatError, match=message):
            check(value, schema, "x")


def test_shapes_agree_with_each_other():
    layout = {"a": (FLOATS, "n 3"), "b?": (FLOATS, "n+1"), "c*": (FLOATS, "n ..."), "d?": (FLOATS, "_ _")}
    here = {
        "a": (torch.float32, (2, 3)),
        "b": (torch.float32, (3,)),
        "c1": (torch.float16, (2, 9)),
        "d": (FLOATS[0], (0, 7)),
    }
    fit(here, layout, "x")
    for name, shape in (("a", (2, 4)), ("a", (0, 3)), ("b", (2,)), ("c1", (3, 9)), ("c2", ()), ("d", (7,))):
        with pytest.raises(FormatError, match="x: [abcd]"):
            fit({**here, name: (torch.float32, shape)}, layout, "x")
    for changed, message in (({"e": here["a"]}, "has also e"), ({}, "lacks a")):
        with pytest.raises(FormatError, match=message):
            fit(here | changed if changed else {}, layout, "x")


@pytest.mark.parametrize(
    "name, what",
    [("run.json", "load_run"), ("manifest.json", "ActivationStore.open"), ("model_index.json", "load_denoiser"),
     ("params.npz", "may be an SAE or a transcoder"), ("ae.pt", "ae.pt cannot be read")],
)  # fmt: skip
def test_another_folder_is_called_by_its_name(tmp_path, name, what):
    (tmp_path / name).write_text("{}")
    with pytest.raises(FormatError, match=what):
        saelab.SAE.load(tmp_path)


def test_a_configuration_alone_is_called_by_its_keys(tmp_path):
    (tmp_path / "cfg.json").write_text(json.dumps({"expansion_factor": 32, "k": 3}))
    with pytest.raises(FormatError, match="has the keys expansion_factor, k, and beside it are no weights"):
        saelab.SAE.load(tmp_path)


def test_without_our_own_file_it_is_read_as_one_of_saelens(saved):
    whole, x = saelab.SAE.load(saved), torch.randn(5, 8)
    (saved / "saelab.safetensors").unlink()
    with pytest.warns(UserWarning, match="has no saelab.safetensors: it is read as SAELens reads it"):
        again = saelab.SAE.load(saved)
    torch.testing.assert_close(again.encode(x), whole.encode(x))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float64, None])
def test_an_sae_is_loaded_in_the_precision_asked_for(saved, dtype):
    whole, sae = saelab.SAE.load(saved), saelab.SAE.load(saved, dtype=dtype, device="cpu")
    wanted = {"bfloat16": torch.bfloat16, None: torch.float32}.get(dtype, dtype)
    assert sae.dtype == wanted and sae.state.scale.dtype == torch.float32
    assert torch.equal(sae.W_dec, whole.W_dec.to(wanted)) and not sae.encode(torch.randn(2, 8)).requires_grad
    for wrong in ({"dtype": "int8"}, {"dtype": "half-ish"}, {"device": "gpu0"}):
        with pytest.raises(ConfigError):
            saelab.SAE.load(saved, **wrong)
