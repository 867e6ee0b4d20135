"""Stores: reading like a tensor, the protocol on disk, damage, kills and full disks."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saelab.base import digests
from saelab.base.errors import CheckpointError, ConfigError, FormatError
from saelab.reading import harvest as harvest_module
from saelab.reading import reader, writers
from saelab.reading.harvest import harvest
from saelab.reading.store import ActivationStore, open_stores
from tests import toy_harvest
from tests.toy_harvest import ToyCorpus, ToyModel

SITES = ["early", "late"]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    """A shard a batch of four contexts of eight tokens: four shards for 100 rows."""
    monkeypatch.setattr(reader, "run_recording", toy_harvest.run_recording)
    monkeypatch.setattr(writers, "SHARD_BYTES", 32 * 6 * 4)


def make(out=None, **other):
    settings = {"sites": SITES, "tokens": 100, "context_length": 8, "batch_size": 4, "progress": False, **other}
    return harvest(ToyModel(), ToyCorpus(), out=out, **settings)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["memory", "disk", "temporary"])
def stores(request, tmp_path, monkeypatch):
    if request.param == "temporary":
        monkeypatch.setattr(harvest_module, "IN_MEMORY", 0)
    return make(tmp_path / "h" if request.param == "disk" else None)


def test_a_store_reads_like_a_tensor(stores):
    for site in SITES:
        store = stores[site]
        x = torch.stack([store[i] for i in range(100)])
        assert x.shape == store.shape == (100, store.d_in) and len(store) == 100 and store.site == site
        expected = ToyModel().activation(ToyCorpus().contexts(None, 8).ids.long(), store.d_in)
        assert torch.equal(x, expected[store.contexts.long(), store.positions.long()])
        for part in (
            slice(None),
            slice(10, 70),
            slice(60, 20),
            slice(-5, None),
            slice(3, 90, 7),
            slice(80, 10, -9),
            slice(40, 1_000),
            slice(5, 5),
        ):
            assert torch.equal(store[part], x[torch.tensor(list(range(100)[part]), dtype=torch.int64)])
        for index in (
            torch.tensor([99, 0, 50, 50, -1]),
            [3, 1, -100],
            torch.tensor([], dtype=torch.int32),
            torch.randperm(100),
            torch.arange(100).view(20, 5),
            x[:, 0] > 0,
        ):
            assert torch.equal(store[index], x[index])
        assert torch.equal(store[-1], x[99]) and torch.equal(store[np.int64(7)], x[7])
        assert torch.equal(torch.vstack(list(store)), x) and torch.equal(torch.vstack(list(store)), x)  # twice
        for outside in (100, -101, torch.tensor([0, 100]), torch.ones(7, dtype=torch.bool)):
            with pytest.raises(IndexError):
                store[outside]
        copy = store[:10]
        copy.zero_()
        store[torch.arange(5)].zero_()
        assert torch.equal(store[:10], x[:10])
    assert torch.equal(stores["early"].tokens, stores["late"].tokens)


def test_iterating_crosses_shards_in_large_chunks(stores, monkeypatch):
    from saelab.reading import shards

    monkeypatch.setattr(shards, "CHUNK_ROWS", 64)
    assert [len(chunk) for chunk in stores["late"]] == [64, 36]


def test_metadata_and_repr(stores, tmp_path):
    metadata = stores["late"].metadata
    assert metadata["model_digest"] == "toy-digest" and metadata["corpus_digest"] == "corpus-digest"
    assert metadata["site"] == "late" and metadata["heads"] == [2, 3] and metadata["dtype"] == "float32"
    assert metadata["context_length"] == 8 and metadata["skip_positions"] == 1 and metadata["tokens"] == 100
    assert metadata["split"] == "train" and metadata["seed"] == 0
    assert repr(stores["late"]).startswith("ActivationStore(100 x 6 float32, site='late', model='toy'")


def test_digests_tell_content_and_site_apart(tmp_path):
    for first, again, other in (
        (make(), make(), make(seed=1)),
        (make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", seed=1)),
    ):
        assert first["late"].digest == again["late"].digest
        assert len({first["late"].digest, first["early"].digest, other["late"].digest}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes_survive_the_disk(tmp_path, dtype):
    exact = make()["late"]
    store = make(tmp_path / "h", dtype=dtype, gradients=True, tokens=90)["late"]
    reopened = ActivationStore.open(tmp_path / "h", site="late")
    assert reopened.dtype == getattr(torch, dtype) == reopened[:3].dtype
    assert torch.equal(store[:], reopened[:]) and torch.equal(store.gradients[:], reopened.gradients[:])
    inner = reopened.positions != 7
    torch.testing.assert_close(store[:9].float(), exact[:][exact.positions != 7][:9], atol=1e-2, rtol=1e-2)
    assert inner.all()


def test_the_folder_follows_the_protocol(tmp_path):
    store = make(tmp_path / "h", gradients=True)["late"]
    manifest = json.loads((tmp_path / "h" / "manifest.json").read_text())
    assert manifest["format"] == "saelab activations" and manifest["version"] == 1
    assert [site["name"] for site in manifest["sites"]] == SITES and manifest["rows"] == 100
    names = {"manifest.json"}
    start = 0
    for number, shard in enumerate(manifest["shards"]):
        rows = load_file(tmp_path / "h" / f"rows-{number:05d}.safetensors")
        site = load_file(tmp_path / "h" / f"site1-{number:05d}.safetensors")
        assert {key: value.dtype for key, value in rows.items()} == dict.fromkeys(
            ("tokens", "positions", "documents", "contexts"), torch.int32
        )
        assert (
            torch.equal(site["x"], store[start : start + shard["rows"]]) and site["gradients"].shape == site["x"].shape
        )
        assert torch.equal(rows["tokens"], store.tokens[start : start + shard["rows"]])
        names |= {f"{part}-{number:05d}.safetensors" for part in ("rows", "site0", "site1")}
        start += shard["rows"]
    assert start == 100 and len(manifest["shards"]) > 1 and {p.name for p in (tmp_path / "h").iterdir()} == names


def test_a_finished_folder_is_opened_and_another_one_refused(tmp_path, monkeypatch):
    before = make(tmp_path / "h")["late"][:]
    written = tree(tmp_path / "h")

    def never(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr(reader, "run_recording", never)
    assert torch.equal(make(tmp_path / "h")["late"][:], before)
    with pytest.raises(CheckpointError, match="another harvest .*seed: 0 there, 1 here; tokens: 100 there, 90 here"):
        make(tmp_path / "h", seed=1, tokens=90)
    assert tree(tmp_path / "h") == written
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="not a harvest"):
        make(tmp_path / "other")
    with pytest.raises(CheckpointError, match="not a harvest"):
        make(tmp_path / "other" / "thesis.tex")


def test_opening_says_which_site(tmp_path):
    make(tmp_path / "h")
    assert ActivationStore.open(tmp_path / "h", site="late").d_in == 6 and list(open_stores(tmp_path / "h")) == SITES
    for site in (None, "middle"):
        with pytest.raises(ConfigError, match="early, late"):
            ActivationStore.open(tmp_path / "h", site=site)
    make(tmp_path / "one", sites=None, site="early")
    assert ActivationStore.open(str(tmp_path / "one")).site == "early"


@pytest.mark.parametrize("part", ["rows", "site1"])
def test_damaged_shards_are_named(tmp_path, part):
    make(tmp_path / "h")
    shard = tmp_path / "h" / f"{part}-00001.safetensors"
    content = shard.read_bytes()

    shard.write_bytes(content[:-1])
    with pytest.raises(FormatError, match=f"{shard.name}.*cut short"):
        ActivationStore.open(tmp_path / "h", site="late")
    with pytest.raises(FormatError, match=shard.name):
        make(tmp_path / "h")
    shard.unlink()
    with pytest.raises(FormatError, match=f"{shard.name}.*none"):
        ActivationStore.open(tmp_path / "h", site="late")

    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    store = ActivationStore.open(tmp_path / "h", site="late")
    with pytest.raises(FormatError, match=f"{shard.name}.*checksum"):
        store.verify()
    store[:5]  # in the first shard, which is whole
    with pytest.raises(FormatError, match=f"{shard.name}.*checksum"):
        store.tokens if part == "rows" else store[:60]
    shard.write_bytes(content)
    ActivationStore.open(tmp_path / "h", site="late").verify()


def test_hostile_manifests_and_shards(tmp_path):
    make(tmp_path / "h", sites=["late"])
    path = tmp_path / "h" / "manifest.json"
    good = json.loads(path.read_text())

    def edited(change):
        manifest = json.loads(json.dumps(good))
        change(manifest)
        return json.dumps(manifest)

    texts = [
        "",
        "{",
        "[]",
        "null",
        '"' * 3,
        "[" * 100_000,
        "{}",
        '{"format": "other"}',
        edited(lambda m: m.update(version=2)),
        edited(lambda m: m.update(dtype="float8")),
        edited(lambda m: m.update(sites=3)),
        edited(lambda m: m.update(rows="many")),
        edited(lambda m: m["shards"][0].update(rows=-1)),
        edited(lambda m: m["shards"][0].update(rows=True)),
        edited(lambda m: m["shards"][0]["files"].pop("rows")),
        edited(lambda m: m["shards"].append(None)),
        edited(lambda m: m["sites"][0].pop("name")),
        edited(lambda m: m.update(fingerprint=[])),
        edited(lambda m: m["shards"][0]["files"]["site0"].update(sha256=5)),
    ]
    for text in texts:
        path.write_text(text)
        with pytest.raises(FormatError, match="manifest.json"):
            ActivationStore.open(tmp_path / "h")
    with pytest.raises(FormatError, match="not a harvest"):
        ActivationStore.open(tmp_path / "nowhere")

    path.write_text(edited(lambda m: m["sites"][0].update(width=5)))
    with pytest.raises(FormatError, match=r"site0-00000.safetensors: x is float32 \[.*, 6\], not float32 \[.*, 5\]"):
        ActivationStore.open(tmp_path / "h")[:2]
    shard = tmp_path / "h" / "site0-00000.safetensors"
    for content in ("x", None):  # a shard that is consistent with its checksum and still wrong
        if content:
            shard.write_bytes((2**62).to_bytes(8, "little") + b"{}")
        else:
            save_file({"y": torch.zeros(3)}, shard)
        entry = {"bytes": shard.stat().st_size, "sha256": digests.of_file(shard)}
        path.write_text(edited(lambda m, entry=entry: m["shards"][0]["files"].update(site0=entry)))
        with pytest.raises(FormatError, match="site0-00000.safetensors"):
            ActivationStore.open(tmp_path / "h")[:2]


def test_a_temporary_folder_goes_with_the_last_object_that_reads_from_it(monkeypatch):
    monkeypatch.setattr(harvest_module, "IN_MEMORY", 100)
    stores = make(gradients=True)
    folder = stores["late"].path
    gradients = stores.pop("late").gradients
    assert folder.exists()
    del stores
    gc.collect()
    assert folder.exists() and len(gradients[:]) == 100
    rows = gradients[50:60]
    del gradients
    gc.collect()
    assert not folder.exists() and rows.isfinite().all()


KILLED = """
import os, signal, sys
from saelab.reading import writers
from saelab.reading.harvest import harvest
from tests import toy_harvest
toy_harvest.install()
writers.SHARD_BYTES = 32 * 6 * 4
replace, left = os.replace, int(sys.argv[2])
def counting(*arguments):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    replace(*arguments)
os.replace = counting
harvest(toy_harvest.ToyModel(), toy_harvest.ToyCorpus(), sites=["early", "late"], tokens=100, context_length=8,
        batch_size=4, progress=False, out=sys.argv[1])
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path[1:]])},
        timeout=120,
    )


def test_killed_again_and_again_the_harvest_ends_in_the_same_bytes(tmp_path):
    """Each shard takes four renames, its three files and the manifest: the kills come between all of them."""
    make(tmp_path / "whole")
    for renames, complete in ((3, 0), (6, 1), (3, 1)):  # the first run also writes the empty manifest
        killed = run(KILLED, tmp_path / "h", renames)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert len(json.loads((tmp_path / "h" / "manifest.json").read_text())["shards"]) == complete
        assert list((tmp_path / "h").glob(".*.tmp-*"))  # the kill left something half-done
        with pytest.raises(CheckpointError, match="not finished: .* of 100 rows"):
            ActivationStore.open(tmp_path / "h", site="late")
    make(tmp_path / "h")
    assert tree(tmp_path / "h") == tree(tmp_path / "whole")


FULL = """
import resource, sys
from saelab.reading import writers
from saelab.reading.harvest import harvest
from saelab.base.errors import CheckpointError
from tests import toy_harvest
toy_harvest.install()
writers.SHARD_BYTES = 32 * 6 * 4
model = toy_harvest.ToyModel()
def filling(lm, *arguments, **others):
    if lm.calls == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    return toy_harvest.run_recording(lm, *arguments, **others)
import saelab.reading.reader as module
module.run_recording = filling
try:
    harvest(model, toy_harvest.ToyCorpus(), sites=["early", "late"], tokens=100, context_length=8, batch_size=4,
            progress=False, out=sys.argv[1])
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_leaves_what_was_complete(tmp_path):
    result = run(FULL, tmp_path / "h")
    assert result.returncode == 0 and "cannot write" in result.stdout and "free some space" in result.stdout, result
    manifest = json.loads((tmp_path / "h" / "manifest.json").read_text())
    assert len(manifest["shards"]) == 2 and not list((tmp_path / "h").glob(".*"))
    make(tmp_path / "h")
    make(tmp_path / "whole")
    assert tree(tmp_path / "h") == tree(tmp_path / "whole")


def test_rows_are_mapped_and_not_read_whole(tmp_path):
    """Opening and gathering a few rows does not load the shards into this process' own memory."""
    make(tmp_path / "h")
    store = ActivationStore.open(tmp_path / "h", site="late")
    store[3]
    mapped = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else "site1-00000.safetensors"
    assert "site1-00000.safetensors" in mapped and "site1-00001.safetensors" not in mapped
    shutil.rmtree(tmp_path / "h")  # what is open stays readable
    assert store[3].isfinite().all()
