"""Stores of many shards: read shard by shard, each row once an epoch, to the same bits after an interruption."""

import inspect
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import saelab
from saelab import ConfigError, TopK
from saelab.reading import harvest, reader, writers
from saelab.reading.shards import FileShard
from saelab.reading.store import ActivationStore
from saelab.training import opening, session
from saelab.training.pieces import StorePieces
from saelab.training.settings import Settings
from saelab.training.sources import RowSource, StreamSource
from tests import toy_harvest
from tests.toy_harvest import ToyCorpus, ToyModel


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """Four shards; stores of more than three are streamed."""
    monkeypatch.setattr(reader, "run_recording", toy_harvest.run_recording)
    monkeypatch.setattr(writers, "SHARD_BYTES", 32 * 6 * 4)
    monkeypatch.setattr(opening, "STREAMED_SHARDS", 3)
    settings = {"sites": ["early", "late"], "tokens": 100, "context_length": 8, "batch_size": 4, "progress": False}
    return harvest.harvest(ToyModel(), ToyCorpus(), out=tmp_path / "store", gradients=True, **settings)


def many_of(folder, count):
    """The folder with its first shard so many times, under as many names."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (first, *_), whole = manifest["shards"], manifest
    for number in range(len(manifest["shards"]), count):
        for part in first["files"]:
            os.link(folder / f"{part}-00000.safetensors", folder / f"{part}-{number:05d}.safetensors")
    for number in range(1, len(manifest["shards"])):
        for part in first["files"]:
            (folder / f"{part}-{number:05d}.safetensors").unlink()
            os.link(folder / f"{part}-00000.safetensors", folder / f"{part}-{number:05d}.safetensors")
    whole |= {"shards": [first] * count, "rows": first["rows"] * count}
    (folder / "manifest.json").write_text(json.dumps(whole))
    return ActivationStore.open(folder, "early")


def in_order(x):
    return torch.tensor(sorted(x.tolist()))


def read(pieces, epoch, cursor=0):
    return torch.cat([rows["x"] for rows, _ in pieces.read(epoch, cursor)])


def test_each_row_comes_once_an_epoch_and_shards_in_another_order_in_the_next(stores):
    pieces, whole = StorePieces({"x": stores["early"]}, seed=0), stores["early"][:]
    first, second = read(pieces, 0), read(pieces, 1)
    assert torch.equal(first, read(pieces, 0)) and not torch.equal(first, second)
    assert torch.equal(in_order(first), in_order(whole)) and torch.equal(in_order(second), in_order(whole))
    each = [(rows["x"], cursor) for rows, cursor in pieces.read(0, 0)]
    for i, (_, cursor) in enumerate(each[:-1]):
        assert torch.equal(read(pieces, 0, cursor), torch.cat([x for x, _ in each[i + 1 :]]))


def test_lanes_have_all_shards_together_and_none_twice(stores):
    pieces = StorePieces({"x": stores["early"]}, seed=0)
    parts = [read(pieces.lane(i, 3), 0) for i in range(3)]
    assert torch.equal(in_order(torch.cat(parts)), in_order(stores["early"][:])) and all(map(len, parts))
    with pytest.raises(ConfigError, match="4 shards do not fill 5 lanes"):
        pieces.lane(0, 5)


def test_columns_stay_beside_each_other(stores):
    columns = {"x": stores["early"], "target": stores["late"], "gradient": stores["early"].gradients}
    for rows, _ in StorePieces(columns, seed=0).read(0, 0):
        assert torch.equal(rows["gradient"], 2 * rows["x"])
        assert torch.equal(rows["target"][:, :4], rows["x"])


def test_training_on_many_shards_streams_and_on_few_reads_at_random(stores, monkeypatch):
    made = []
    for kind in (RowSource, StreamSource):
        before = kind.__init__
        monkeypatch.setattr(
            kind, "__init__", lambda self, *a, _b=before, **k: (made.append(type(self)), _b(self, *a, **k))[1]
        )
    how = {"sae": TopK(k=2, d_sae=16), "tokens": 400, "batch_size": 20, "buffer_tokens": 2100, "progress": False}
    streamed = saelab.train(stores["early"], **how)
    monkeypatch.setattr(opening, "STREAMED_SHARDS", 4)
    saelab.train(stores["early"], **how)
    assert made == [StreamSource, RowSource]
    assert streamed.sae.metadata["trained_on"] == "store" and streamed.sae.metadata["site"] == "early"
    both = saelab.train((stores["early"], stores["late"]), **how | {"sae": saelab.Transcoder(of=TopK(k=2, d_sae=16))})
    assert both.sae.d_out == 6


def test_an_interrupted_run_goes_on_to_the_same_bits(stores, tmp_path, monkeypatch):
    how = {"sae": TopK(k=2, d_sae=16), "tokens": 600, "batch_size": 20, "buffer_tokens": 2100, "progress": False}
    whole = saelab.train(stores["early"], out=tmp_path / "whole", **how)
    step = session.Session.step

    def interrupted(self, log):
        if self.lead.done == 13:
            self.interrupted.set()
        return step(self, log)

    monkeypatch.setattr(session.Session, "step", interrupted)
    assert saelab.train(stores["early"], out=tmp_path / "cut", **how).interrupted
    monkeypatch.setattr(session.Session, "step", step)
    again = saelab.train(stores["early"], out=tmp_path / "cut", **how)
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, again.sae.state_dict()[name]), name


def test_the_first_batch_of_two_thousand_shards_opens_as_many_as_fill_the_buffer(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "STREAMED_SHARDS", 256)
    store, mapped, map_ = many_of(tmp_path / "store", 2000), [], FileShard._map
    monkeypatch.setattr(FileShard, "_map", lambda self, part: (mapped.append(part), map_(self, part))[1])
    call = inspect.signature(saelab.train).bind(store, sae=None, tokens=10_000, batch_size=50, buffer_tokens=2100)
    call.apply_defaults()
    source = opening.open_source(store, None, Settings.of(call.arguments), gradients=False).source
    assert mapped == []
    source.next(50)
    assert len(mapped) <= 2100 // store.bounds[1] and set(mapped) == {"site0"}
    assert sum(len(shard._open) for shard in store._shards) <= 1  # what was read is let go


def test_a_value_that_is_not_finite_is_named_by_its_rows(stores, monkeypatch):
    store = stores["early"]
    item = type(store).__getitem__
    start, end = store.bounds[2:4]
    monkeypatch.setattr(type(store), "__getitem__", lambda self, i: item(self, i) / (0.0 if i.start == start else 1.0))
    with pytest.raises(saelab.SaelabError, match=f"rows {start} to {end} of the activations"):
        read(StorePieces({"x": store}, seed=0), 0)


def test_a_store_that_is_let_go_of_can_be_read_in_another_thread(stores, monkeypatch):
    store, map_ = stores["early"], FileShard._map

    def let_go_of_meanwhile(self, part):
        found = map_(self, part)
        self._open[part] = found
        store.release()
        return found

    whole = store[:]
    store.release()
    monkeypatch.setattr(FileShard, "_map", let_go_of_meanwhile)
    assert torch.equal(store[:], whole)
    monkeypatch.undo()
    reads = [(lambda: store[:]), store.release] * 100
    with ThreadPoolExecutor(4) as pool:
        found = [one.result() for one in [pool.submit(read) for read in reads]]
    assert all(torch.equal(x, whole) for x in found if x is not None)
