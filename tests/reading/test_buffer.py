"""The buffer: every row once, uniformly, with little bookkeeping and a state that continues bitwise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.base.errors import CheckpointError, ConfigError
from saelab.reading.buffer import ActivationBuffer, parse_bytes, parse_capacity

COLUMNS = {"x": (3, torch.float32), "row": (0, torch.int64)}


def rows(start: int, n: int) -> dict[str, torch.Tensor]:
    number = torch.arange(start, start + n)
    return {"x": torch.stack([number, number * 2, -number], 1).float(), "row": number}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=40), st.integers(0, 99))
def test_every_row_is_drawn_exactly_once_and_stays_aligned(capacity, steps, seed):
    buffer = ActivationBuffer(capacity, COLUMNS, seed)
    added, drawn = 0, []
    for adding, n in steps:
        if adding:
            n = min(n, buffer.free())
            buffer.add(rows(added, n))
            added += n
        else:
            batch = buffer.draw(min(n, len(buffer)))
            assert torch.equal(batch["x"], rows(0, added)["x"][batch["row"]])
            drawn += batch["row"].tolist()
        assert len(buffer) + len(drawn) == added and len(buffer) + buffer.free() == capacity
    drawn += buffer.draw(len(buffer))["row"].tolist()
    assert sorted(drawn) == list(range(added))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99))
def test_a_restored_buffer_goes_on_with_the_same_bits(n_added, n_drawn, dtype, seed):
    columns = {"x": (3, dtype), "row": (0, torch.int64)}
    buffer = ActivationBuffer(64, columns, seed)
    buffer.add(rows(0, n_added))
    buffer.draw(min(n_drawn, n_added))
    state = buffer.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert len(state["column.x"]) == len(buffer)  # nothing that was read, nothing that is free
    other = ActivationBuffer(64, columns, seed + 1)
    other.add(rows(500, 7))
    other.load_state_dict(state)
    for step in range(4):
        ours, theirs = buffer.draw(len(buffer) // 3), other.draw(len(other) // 3)
        assert all(torch.equal(ours[name], theirs[name]) for name in columns)
        buffer.add(rows(100 + 5 * step, 5))
        other.add(rows(100 + 5 * step, 5))
    for a, b in zip(buffer.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    buffer = ActivationBuffer(8, COLUMNS, seed=0)
    buffer.add(rows(0, 4))
    large = ActivationBuffer(20, COLUMNS, seed=0)
    large.add(rows(0, 12))
    with pytest.raises(CheckpointError, match="12 unread rows.*capacity of 8"):
        buffer.load_state_dict(large.state_dict())
    narrow = ActivationBuffer(8, {"x": (2, torch.float32), "row": (0, torch.int64)}, seed=0)
    half = ActivationBuffer(8, {"x": (3, torch.float16), "row": (0, torch.int64)}, seed=0)
    for state in (narrow.state_dict(), half.state_dict(), {}, buffer.state_dict() | {"generator": torch.zeros(3)}):
        with pytest.raises(CheckpointError):
            buffer.load_state_dict(state)
    assert sorted(buffer.draw(4)["row"].tolist()) == [0, 1, 2, 3]


def test_draws_are_uniform_over_the_whole_buffer():
    """Chi-squared over slots, for the sparse way of drawing (few of many) and the dense one."""
    for n, total in ((10, 100), (60, 100)):
        counts, repeats = torch.zeros(total), 2000
        for seed in range(repeats):
            buffer = ActivationBuffer(total, {"row": (0, torch.int64)}, seed)
            buffer.add({"row": torch.arange(total)})
            counts[buffer.draw(n)["row"]] += 1
        expected = repeats * n / total
        chi2 = float(((counts - expected) ** 2 / (expected * (1 - n / total))).sum()) * (total - 1) / total
        assert 60 < chi2 < 150  # 99 degrees of freedom: 0.9999 of the time within


def test_neighbouring_tokens_in_a_batch_are_correlated_at_chance():
    """Rows of an autoregressive walk arrive in order; consecutive rows of a batch must not resemble each other."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.zeros(20_000, 16)
    noise = torch.randn(20_000, 16, generator=generator)
    for i in range(1, len(walk)):
        walk[i] = 0.95 * walk[i - 1] + 0.3 * noise[i]
    assert similarity(walk) > 0.9
    buffer = ActivationBuffer(8_192, {"x": (16, torch.float32), "row": (0, torch.int64)}, seed=0)
    arriving, found, distances = iter(range(0, 20_000 - 512, 512)), [], []
    for start in arriving:
        if buffer.free() < 512:
            batch = buffer.draw(1_024)
            found.append(similarity(batch["x"]))
            distances.append(float((batch["row"].diff().abs() < 8).float().mean()))
        buffer.add({"x": walk[start : start + 512], "row": torch.arange(start, start + 512)})
    # 16 dimensions and 1,023 pairs a batch, over some ten batches: 0.02 is far beyond chance's 1 / sqrt(16 * 10_230)
    assert len(found) > 5 and abs(sum(found) / len(found)) < 0.02
    assert sum(distances) / len(distances) < 0.01  # chance: about 16 / 8,192


def similarity(x: torch.Tensor) -> float:
    """Correlation of consecutive rows, over all dimensions."""
    x = x - x.mean(0)
    return float((x[1:] * x[:-1]).sum() / (x * x).sum())


def test_drawing_copies_and_slots_are_reused():
    buffer = ActivationBuffer(4, COLUMNS, seed=0)
    storage = buffer._columns["x"].data_ptr()
    for start in range(0, 40, 4):
        buffer.add(rows(start, 4))
        batch = buffer.draw(4)
        before = batch["x"].clone()
        buffer.add(rows(900, 4))
        assert torch.equal(batch["x"], before)
        buffer.draw(4)
    assert buffer._columns["x"].data_ptr() == storage


def test_global_random_state_is_left_alone_and_seeds_decide():
    before = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        buffer = ActivationBuffer(64, COLUMNS, seed)
        buffer.add(rows(0, 64))
        drawn.append(buffer.draw(16)["row"].tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(before, torch.get_rng_state())


def test_rows_with_gradients_or_made_in_inference_mode_are_accepted():
    buffer = ActivationBuffer(8, {"x": (2, torch.float32)}, seed=0)
    buffer.add({"x": torch.ones(2, 2, requires_grad=True)})
    with torch.inference_mode():
        made = torch.ones(2, 2)
    buffer.add({"x": made})
    weight = torch.ones(2, requires_grad=True)
    (buffer.draw(4)["x"] @ weight).sum().backward()
    assert weight.grad.tolist() == [4, 4]


def test_bad_requests_say_the_numbers():
    buffer = ActivationBuffer(2_560, COLUMNS, seed=0)
    expected = (
        r"buffer of 2,560 tokens is smaller than the batch of 4,096: raise `buffer_tokens` or lower "
        "`batch_size`"
    )
    with pytest.raises(ConfigError, match=expected):
        buffer.draw(4_096)
    with pytest.raises(ConfigError, match=expected):
        buffer.require(4_096)
    with pytest.raises(ConfigError, match="1,000 rows asked of a buffer with 0 unread"):
        buffer.draw(1_000)
    buffer.add(rows(0, 2_500))
    with pytest.raises(ConfigError, match="61 rows do not fit into the 60 free"):
        buffer.add(rows(0, 61))
    with pytest.raises(ConfigError, match="columns"):
        buffer.add({"x": torch.zeros(1, 3)})
    with pytest.raises(ConfigError, match="different lengths"):
        buffer.add({"x": torch.zeros(1, 3), "row": torch.zeros(2)})
    with pytest.raises(ConfigError, match="shape"):
        buffer.add({"x": torch.zeros(1, 4), "row": torch.zeros(1)})
    assert len(buffer) == 2_500


def test_capacities_in_bytes():
    assert parse_bytes("2GiB") == 2 * 2**30 and parse_bytes(" 1,000 kb") == 1_000_000
    assert parse_capacity("2GiB", 2304) == 2**31 // 2304
    assert ActivationBuffer("1KiB", {"x": (8, torch.bfloat16)}, seed=0).capacity == 64
    for wrong in ("2 gibi", "GiB", "-1GiB", "12", ""):
        with pytest.raises(ConfigError, match="not a size"):
            parse_bytes(wrong)
    for nothing in (0, -3, "10B"):
        with pytest.raises(ConfigError, match="holds no row"):
            ActivationBuffer(nothing, COLUMNS, seed=0)
