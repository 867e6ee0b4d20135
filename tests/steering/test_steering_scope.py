"""Where operations act: each clause by itself, then cache, padding and batch, which must not matter."""

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab import steering
from saelab.base.errors import ConfigError, InterventionError
from saelab.models.generation import generate_ids
from saelab.models.tokens import padded
from saelab.models.where import Where, locator
from saelab.models.where import prompt as prompt_of
from saelab.steering import Scope
from tests.toy_steering import PROMPTS, SITE, busy, doubles, sae_of

SCOPES = {
    "default": Scope(),
    "prompt": Scope(generated=False),
    "generated": Scope(prompt=False),
    "first token too": Scope(skip_positions=0),
    "late": Scope(skip_positions=5),
    "position": Scope(positions=[1]),
    "last of the prompt": Scope(positions=[-1], skip_positions=0),
    "positions from both ends": Scope(positions=[1, 9, -2], skip_positions=0),
    "window": Scope(windows=[(1, 6)]),
    "window from the end on": Scope(windows=[(-2, None)], skip_positions=0),
    "window to the end": Scope(windows=[(0, -1), (8, 10)], skip_positions=0),
    "excluding": Scope(exclude_positions=[-1, 10], exclude_windows=[(2, 4)]),
    "tokens": Scope(tokens=list(range(0, 258, 2)), skip_positions=0),
    "all but tokens": Scope(exclude_tokens=list(range(0, 258, 3))),
    "special too": Scope(special=True, generated=False),
}


@pytest.fixture(scope="module", params=[0, 1], ids=["llama", "gpt2"])
def lm(request):
    return doubles()[request.param]


@pytest.fixture(scope="module")
def sae(lm):
    return sae_of(lm)


def operations(sae, scope):
    """Strong ones: the random models repeat their last token unless pushed."""
    one, two, three = busy(sae, 3)
    return [
        steering.add(sae, one, strength=-30.0, scope=scope),
        steering.clamp(sae, two, strength=20.0, scope=scope),
        steering.project_out(sae, three, scope=scope),
    ]


def where_of(*rows, generated=0, left=False):
    tokens = padded(rows, 257, left=left)
    positions = (tokens.mask.cumsum(1) - 1).clamp(min=0)
    columns = torch.arange(tokens.ids.shape[1])
    grown = (columns >= tokens.ids.shape[1] - generated).expand_as(tokens.ids)
    return Where(tokens.ids, positions, tokens.mask, grown, "prompt")


def touched(lm, scope, where):
    return [row.nonzero().flatten().tolist() for row in scope.mask(where, lm)]


def test_clauses(lm):
    where = where_of([5, 6, 7, 256, 9, 10, 11], generated=2)  # 5 of the prompt, of which one special, then 2 more
    cases = [
        (Scope(), [1, 2, 4, 5, 6]),
        (Scope(skip_positions=0), [0, 1, 2, 4, 5, 6]),
        (Scope(special=True), [1, 2, 3, 4, 5, 6]),
        (Scope(generated=False), [1, 2, 4]),
        (Scope(prompt=False), [5, 6]),
        (Scope(positions=[2, -1, 6]), [2, 4, 6]),
        (Scope(positions=-3), [2]),
        (Scope(windows=[(-1, None)]), [4, 5, 6]),
        (Scope(windows=[(0, -2)]), [1, 2]),
        (Scope(windows=[(1, 3), (6, 99)]), [1, 2, 6]),
        (Scope(tokens=[9, 5, 11]), [4, 6]),
        (Scope(tokens=[256], special=True), [3]),
        (Scope(tokens=[9], positions=[1]), [1, 4]),
        (Scope(exclude_tokens=[9], exclude_positions=[1], exclude_windows=[(6, None)]), [2, 5]),
        (Scope(positions=[1, 2], exclude_tokens=[7]), [1]),
    ]
    for scope, expected in cases:
        assert touched(lm, scope, where) == [expected], scope


def test_padding_does_not_count(lm):
    rows = [[5, 6, 7, 8], [9, 10]]
    for left in (False, True):
        where = where_of(*rows, left=left)
        shift = 2 if left else 0
        assert touched(lm, Scope(positions=[-1, 0], skip_positions=0), where) == [[0, 3], [shift, shift + 1]]
        assert touched(lm, Scope(), where) == [[1, 2, 3], [shift + 1]]
        assert touched(lm, Scope(windows=[(-3, None)], skip_positions=0), where) == [[1, 2, 3], [shift, shift + 1]]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_scope_is_the_same_token_by_token(lm, data):
    """A context read at once, and prompt then single tokens against a cache, give the same mask."""
    whole = st.integers(-6, 12)
    windows = st.lists(st.tuples(st.integers(-6, 6), st.none() | whole), min_size=1, max_size=2)
    some = st.none() | st.lists(whole, min_size=1, max_size=3)
    arguments = data.draw(st.fixed_dictionaries({
        "prompt": st.booleans(), "generated": st.booleans(), "positions": some, "windows": st.none() | windows,
        "tokens": st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3),
        "exclude_positions": st.lists(whole, max_size=2), "exclude_tokens": st.lists(st.integers(0, 9), max_size=2),
        "skip_positions": st.integers(0, 3),
    }))  # fmt: skip
    try:
        scope = Scope(**arguments)
    except ConfigError:
        return
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    chance = random.Random(data.draw(st.integers(0, 99)))
    rows = [[chance.randrange(10) for _ in range(n)] for n in lengths]
    context = padded(rows, 257, left=True)
    width = context.ids.shape[1]
    more = torch.tensor([[chance.randrange(10) for _ in range(5)] for _ in rows])
    ids, mask = torch.cat([context.ids, more], 1), torch.cat([context.mask, torch.ones_like(more, dtype=torch.bool)], 1)
    locate = locator(["input_ids", "attention_mask", "past_key_values"])

    class Cache:
        def __init__(self, n):
            self.n = n

        def get_seq_length(self):
            return self.n

    with prompt_of(width):
        at_once = scope.mask(locate((ids, mask), {}), lm)
        steps = [scope.mask(locate((ids[:, :width], mask[:, :width]), {}), lm)]
        for n in range(width, width + 5):
            steps.append(scope.mask(locate((ids[:, n : n + 1], mask[:, : n + 1], Cache(n)), {}), lm))
    assert torch.equal(at_once, torch.cat(steps, 1))
    for i, (row, together) in enumerate(zip(rows, at_once, strict=True)):
        alone = torch.tensor([row + more[i].tolist()])
        with prompt_of(len(row)):
            single = scope.mask(locate((alone,), {}), lm)[0]
        assert torch.equal(single, together[width - len(row) :])
    assert Scope(**json.loads(json.dumps(scope.to_dict()))) == scope


@pytest.mark.parametrize("temperature", [0, 1.0], ids=["greedy", "seeded"])
@pytest.mark.parametrize("name", SCOPES)
def test_neither_cache_nor_batch_nor_padding_changes_a_token(lm, sae, name, temperature):
    tokens = lm.tokenize(PROMPTS)
    made = operations(sae, SCOPES[name])
    how = {"max_new_tokens": 9, "temperature": temperature, "seed": 3}
    with lm.steer(*made) as receipt:
        cached = generate_ids(lm, tokens, **how)
    with lm.steer(*made):
        assert generate_ids(lm, tokens, **how, use_cache=False) == cached
    for i, prompt in enumerate(PROMPTS):
        # a prompt of which nothing is in scope is an error, once its text is there
        with contextlib.suppress(InterventionError), lm.steer(*made):
            alone = generate_ids(lm, lm.tokenize(prompt), 9, temperature, [(3, i)])
        assert alone == [cached[i]]
    plain = generate_ids(lm, tokens, **how)
    assert cached != plain and (receipt.to_pandas().changed > 0).any()


@pytest.mark.parametrize("name", SCOPES)
def test_logits_of_a_batch_are_those_of_each_text(lm, sae, name):
    """Padding on the right, padding on the left, one text at a time."""
    scope = SCOPES[name]
    if not scope.prompt:
        return  # a plain call has no generated tokens
    texts = ["The state of the union is", "My fellow citizens", "economy"]
    rows = lm.tokenize(texts).rows()
    made = operations(sae, scope)
    with lm.steer(*made):
        right, left = lm.logits(padded(rows, 257)), lm.logits(padded(rows, 257, left=True))
    with lm.steer(*made):
        for i, row in enumerate(rows):
            single = lm.logits(torch.tensor(row))[0]
            torch.testing.assert_close(right[i, : len(row)], single, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(left[i, -len(row) :], single, rtol=1e-9, atol=1e-11)


def test_rows_of_their_own(lm, sae):
    """Each row of `steer_rows` is what its operations alone make of its prompt; an empty list is the plain model."""
    tokens = lm.tokenize(PROMPTS)
    one, two, three = operations(sae, Scope())
    rows = [[one, two], [], [three]]
    with steering.steer_rows(lm, rows) as receipt:
        together = generate_ids(lm, tokens, 9, seed=1)
        logits = lm.logits(tokens)
    assert together[1] == generate_ids(lm, tokens, 9, seed=1)[1]
    for i in (0, 2):
        with lm.steer(*rows[i]):
            assert generate_ids(lm, tokens, 9, seed=1)[i] == together[i]
            torch.testing.assert_close(lm.logits(tokens)[i], logits[i], rtol=1e-9, atol=1e-11)
    table = receipt.to_pandas()
    assert table.operation.tolist() == ["add", "clamp", "project_out"] and (table.positions > 0).all()
    assert table.positions[0] == table.positions[1] != table.positions[2]
    with pytest.raises(InterventionError, match="batch of 1 rows came where 3"), steering.steer_rows(lm, rows):
        lm.logits("abc")
    with pytest.raises(ConfigError, match="one of the rows"), steering.steer_rows(lm, [[], []]):
        pass


def test_one_operation_may_stand_in_several_rows(lm, sae):
    one = operations(sae, Scope())[0]
    with steering.steer_rows(lm, [[one], [one]]) as receipt:
        both = lm.logits(["abcd", "wxyz"])
    with lm.steer(one):
        torch.testing.assert_close(lm.logits(["abcd", "wxyz"]), both, rtol=1e-12, atol=1e-14)
    assert receipt.to_pandas().positions.tolist() == [6]


def test_seeds_of_their_own(lm):
    tokens = lm.tokenize(["abc", "xyz", "abc"])
    rows = generate_ids(lm, tokens, 9, seed=5)
    assert generate_ids(lm, lm.tokenize(["xyz", "abc"]), 9, seed=[(5, 1), (5, 2)]) == rows[1:]
    with pytest.raises(ConfigError, match="2 seeds for 3 prompts"):
        generate_ids(lm, tokens, 3, seed=[(0, 0), (0, 1)])


def test_very_long_activations_are_left_alone_unless_asked(lm, sae):
    x = lm.record("abcdefgh", SITE)[0]
    sae.state.norm_limit.fill_(x[3].norm() * 0.999)
    try:
        within = (x.norm(dim=1).float() <= sae.state.norm_limit).clone()
        within[0] = False
        latent = busy(sae, 1)[0]
        for scope, mask in ((Scope(), within), (Scope(high_norm=True), torch.arange(8) > 0)):
            with lm.steer(steering.add(sae, latent, strength=2.0, scope=scope)) as receipt:
                changed = (lm.record("abcdefgh", SITE)[0] != x).any(1)
            assert torch.equal(changed, mask) and receipt.to_pandas().positions[0] == mask.sum()
        assert not within.all() and within.any()
    finally:
        sae.state.norm_limit.fill_(torch.inf)


EMPTY = [
    {"prompt": False, "generated": False},
    {"positions": []},
    {"tokens": []},
    {"windows": [(5, 5)]},
    {"windows": [(-1, -3)]},
    {"positions": [0]},
    {"positions": [3], "exclude_positions": [3]},
    {"positions": [-1], "prompt": False},
    {"windows": [(0, 1)]},
    {"tokens": [7], "exclude_tokens": [7, 8]},
]


@pytest.mark.parametrize("arguments", EMPTY, ids=str)
def test_an_empty_scope_is_an_error(arguments):
    with pytest.raises(ConfigError, match="the scope is empty"):
        Scope(**arguments)


def test_a_scope_of_other_things_is_an_error():
    with pytest.raises(ConfigError, match="whole numbers, not 1.5"):
        Scope(positions=[1.5])
    with pytest.raises(ConfigError, match="pairs"):
        Scope(windows=[1, 2])
    for slip in (
        {"positions": 2.0},
        {"positions": "12"},
        {"tokens": ["a"]},
        {"tokens": np.array([True])},
        {"tokens": [True]},
    ):
        with pytest.raises(ConfigError, match="whole numbers"):
            Scope(**slip)
    for slip in ({"skip_positions": -1}, {"skip_positions": 1.5}, {"prompt": "no"}, {"special": None}):
        with pytest.raises(ConfigError, match=next(iter(slip))):
            Scope(**slip)
    assert repr(Scope(tokens=[3], special=True)) == "Scope(tokens=(3,), special=True)"


@pytest.mark.parametrize(
    "places", [np.int64(2), [np.int64(2)], np.array([2]), np.array(2), torch.tensor([2]), torch.tensor(2)]
)
def test_whole_numbers_of_any_library(places):
    scope = Scope(positions=places, skip_positions=np.int64(1))
    assert scope == Scope(positions=2) and json.dumps(scope.to_dict()) == '{"positions": [2]}'
