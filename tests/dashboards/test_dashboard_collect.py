"""The collector: one pass, the same bits however it is cut, shards that are resumed, memory that is said beforehand."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import saelab
from saelab.base.errors import ConfigError, DataError
from saelab.dashboards.collecting import collect as collecting
from saelab.dashboards.collecting import latent_figures as figures
from saelab.dashboards.collecting.collect import Collection, collect, fingerprint, predicted_bytes
from saelab.dashboards.collecting.one_pass import Reader
from tests.toy_dashboard import LENGTH, SITE, TEXTS, make_sae, oracle

TOKENS = 9_000


@pytest.fixture(scope="module")
def sae(tiny_llama):
    return make_sae(tiny_llama)


@pytest.fixture(scope="module")
def contexts(tiny_llama):
    return saelab.load_corpus(TEXTS).contexts(tiny_llama, LENGTH)


@pytest.fixture
def reader(tiny_llama, sae, contexts):
    return Reader.of(tiny_llama, [sae], contexts, TOKENS)


@pytest.fixture
def forwards(tiny_llama):
    """A call gives the rows of every forward pass from then on, to the end of the test."""
    handles = []

    def watched() -> list[int]:
        seen: list[int] = []
        handles.append(
            tiny_llama.runner.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(len((args or [kwargs.get("input_ids", ())])[0])),
                with_kwargs=True,
            )
        )
        return seen

    yield watched
    for handle in handles:
        handle.remove()


def same(one: Collection, other: Collection) -> bool:
    a, b = one.firings(0, one.d_sae), other.firings(0, other.d_sae)
    arrays = [(a.offsets, b.offsets), (a.rows, b.rows), (a.values, b.values), (one.counted, other.counted),
              (one.miss, other.miss), *zip(one.near, other.near, strict=True)]  # fmt: skip
    return one.explained_variance == other.explained_variance and all(np.array_equal(x, y) for x, y in arrays)


def test_firings_against_dense_codes(tiny_llama, sae, contexts, reader, tmp_path):
    (found,) = collect(reader, tmp_path, shards=3, progress=False)
    truth = oracle(tiny_llama, sae, contexts, reader.n_contexts, reader.tile_contexts)
    firings = found.firings(0, sae.d_sae)
    dense = np.zeros_like(truth.acts)
    dense[firings.rows, firings.latents] = firings.values
    np.testing.assert_array_equal(dense, truth.acts)
    np.testing.assert_array_equal(found.counted, truth.counted)
    np.testing.assert_array_equal(found.miss, truth.miss)
    assert found.l0 == truth.acts.astype(bool).sum() / truth.counted.sum()
    for i in range(sae.d_sae):
        rows = firings.rows[firings.offsets[i] : firings.offsets[i + 1]]
        assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize(("shards", "batch_tiles"), [(1, 1), (2, 3), (4, 1), (4, 4)])
def test_the_same_however_it_is_cut(reader, tmp_path, shards, batch_tiles):
    (first,) = collect(reader, tmp_path / "a", shards=1, batch_tiles=4, progress=False)
    (other,) = collect(reader, tmp_path / "b", shards=shards, batch_tiles=batch_tiles, progress=False)
    assert reader.n_tiles >= 4
    assert len(other.shards) == shards
    assert same(first, other)


def test_parts_are_slices_of_the_whole(reader, tmp_path, monkeypatch):
    (found,) = collect(reader, tmp_path, shards=2, progress=False)
    monkeypatch.setattr(collecting, "RANGE_FIRINGS", 700)
    assert [lo for lo, _ in found.ranges()][0] == 0
    assert [hi for _, hi in found.ranges()][:-1] == [lo for lo, _ in found.ranges()][1:]
    whole = found.firings(0, found.d_sae)
    asked = np.array([1, 2, 3, 7, 40])
    taken = [(some, f) for some, f in found.of(asked)]
    assert np.concatenate([some for some, _ in taken]).tolist() == asked.tolist()
    for some, f in taken:
        for i, latent in enumerate(some):
            mine = slice(whole.offsets[latent], whole.offsets[latent + 1])
            np.testing.assert_array_equal(f.rows[f.offsets[i] : f.offsets[i + 1]], whole.rows[mine])


def test_one_forward_pass_for_any_number_of_saes(forwards, tiny_llama, sae, contexts, tmp_path):
    rival = make_sae(tiny_llama, "blocks.2.hook_resid_post", d_sae=32, seed=1)
    reader = Reader.of(tiny_llama, [sae, rival], contexts, TOKENS)
    seen = forwards()
    found = collect(reader, tmp_path, shards=2, progress=False)
    assert len(seen) == reader.n_tiles and sum(seen) == reader.n_tiles * reader.tile_contexts
    alone = collect(Reader.of(tiny_llama, [sae], contexts, TOKENS), tmp_path / "alone", progress=False)[0]
    assert same(found[0], alone)


def test_a_killed_pass_goes_on_shard_by_shard(tiny_llama, reader, tmp_path, monkeypatch):
    (whole,) = collect(reader, tmp_path / "whole", shards=4, progress=False)
    tiles, read = Reader.tiles, []

    def killed(self, first, last):
        if first >= 2:
            raise KeyboardInterrupt
        return tiles(self, first, last)

    monkeypatch.setattr(Reader, "tiles", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(reader, tmp_path / "part", shards=4, progress=False)
    kept = sorted((tmp_path / "part").iterdir())
    assert 0 < len(kept) < 4
    monkeypatch.setattr(Reader, "tiles", lambda self, first, last: (read.append(first), tiles(self, first, last))[1])
    (again,) = collect(reader, tmp_path / "part", shards=4, progress=False)
    assert len(read) == 4 - len(kept)
    assert same(whole, again)

    damaged = sorted((tmp_path / "part").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    read.clear()
    assert same(whole, collect(reader, tmp_path / "part", shards=4, progress=False)[0])
    assert len(read) == 1


def test_shards_of_other_weights_are_not_taken(forwards, tiny_llama, contexts, reader, tmp_path):
    collect(reader, tmp_path, shards=2, progress=False)
    other = Reader.of(tiny_llama, [make_sae(tiny_llama, seed=3)], contexts, TOKENS)
    assert fingerprint(other) != fingerprint(reader)
    seen = forwards()
    collect(other, tmp_path, shards=2, progress=False)
    assert sum(seen) == other.n_tiles * other.tile_contexts


def test_too_little_memory_or_disk_is_said_before_the_pass(forwards, tiny_llama, reader, tmp_path, monkeypatch):
    seen = forwards()
    with pytest.raises(ConfigError, match=r"would take [\d,]+ bytes of memory, more than 1,000"):
        collect(reader, tmp_path, memory=1_000, progress=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ConfigError, match=r"take [\d,]+ bytes in .*, which has 10 free"):
        collect(reader, tmp_path, progress=False)
    assert not seen


def test_nothing_counted_is_an_error(tiny_llama, sae, tmp_path):
    special = torch.full((30, LENGTH), 256)
    contexts = saelab.load_corpus(special).contexts(tiny_llama, LENGTH, split="all")
    with pytest.raises(DataError, match="none of the 960 tokens"):
        collect(Reader.of(tiny_llama, [sae], contexts, 960), tmp_path, progress=False)


def test_activations_that_are_not_finite_are_named(tiny_llama, sae, contexts, tmp_path):
    def spoil(x, where):
        x = x.clone()
        x[1, 3] = torch.nan
        return x

    with tiny_llama.intervene(SITE, spoil), pytest.raises(DataError, match="context 1, position 3"):
        collect(Reader.of(tiny_llama, [sae], contexts, TOKENS), tmp_path, progress=False)


def test_the_largest_near_misses_best_first_the_earlier_among_equals():
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 3, (50, 40)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[scores == 0] *= rng.choice([1.0, -1.0], (scores == 0).sum())  # zeros of both signs are equal
    rows = np.tile(np.arange(40, dtype=np.int32), (50, 1))
    best, where = collecting._largest(scores, rows)
    for i in range(50):
        expected = sorted(range(40), key=lambda j: (-scores[i, j], j))[: collecting.NEAR]
        assert where[i].tolist() == expected and best[i].tolist() == scores[i, expected].tolist()


MEMORY = """
import re, sys, types
from pathlib import Path
import numpy as np, torch
from saelab.dashboards.collecting import collect as c, latent_figures as figures
from saelab.dashboards.collecting.one_pass import Tile
F, K, T = 16_384, 32, 65_536
reader = types.SimpleNamespace(n_contexts=T // 256, length=256, tile_contexts=8, n_tiles=T // 2048,
                               saes=[types.SimpleNamespace(d_sae=F, d_out=576)])
need, _ = c.predicted_bytes(reader, K)
generator = torch.Generator().manual_seed(0)
def tile(t):
    latents = torch.randint(F, (2048 * K,), generator=generator, dtype=torch.int32)
    return Tile(torch.repeat_interleave(torch.arange(t * 2048, (t + 1) * 2048, dtype=torch.int32), K), latents,
                torch.rand(2048 * K, generator=generator) + .01, torch.ones(2048, dtype=torch.bool),
                torch.zeros(2048, dtype=torch.uint8), torch.zeros(3, dtype=torch.float64),
                torch.rand(F), torch.zeros(F, dtype=torch.int32))
def run(n):
    shard = c._transposed([c._joined([tile(4 * i + j) for j in range(4)]) for i in range(n)], F)
    found = c.Collection(F, 256, T // 256, [{k: v.numpy() for k, v in shard.items()}])
    figures.index(found, np.zeros(T, np.int32), np.ones(T // 256, bool), np.full(1, T))
def peak():  # of this process alone: ru_maxrss begins with that of the parent
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
run(1)  # what the libraries take once
before = peak()
run(T // 8192)
print(peak() - before, need)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_what_was_said():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    used, said = map(int, done.stdout.split())
    assert 0 < used < said < 2**30


def test_the_prediction_for_sixteen_thousand_latents_is_below_a_gibibyte():
    class Big:
        n_contexts, length, tile_contexts, n_tiles = 3_907, 256, 8, 489
        saes = [type("S", (), {"d_sae": 16_384, "d_out": 576})()]

    memory, disk = predicted_bytes(Big, 32.0)  # type: ignore[arg-type]
    assert memory < 2**30
    assert disk > 8 * 32 * 1_000_000


@pytest.mark.parametrize("octave", [-140, -126, -3, 0, 60])
def test_bins_hold_their_lower_edge(octave):
    edges = np.array([2.0 ** (octave + j / 4) for j in range(4)])
    below, above = edges.astype(np.float32), edges.astype(np.float32)
    above = np.where(above < edges, np.nextafter(above, np.float32(np.inf)), above)
    below = np.nextafter(above, np.float32(0))
    if octave >= -126:
        np.testing.assert_array_equal(figures.bins(above), 4 * octave + np.arange(4))
        np.testing.assert_array_equal(figures.bins(below), 4 * octave + np.arange(4) - 1)
    else:
        np.testing.assert_array_equal(figures.bins(above[:1]), [4 * octave])
