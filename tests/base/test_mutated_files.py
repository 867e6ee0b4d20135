"""Whatever is changed in a file: it is read as it was saved, or refused by an error of ours, soon and in little memory.

`SAELAB_MUTATIONS=5000 pytest tests/base/test_mutated_files.py` tries so many in all.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch

import saelab
from saelab import hspace, steering
from saelab.base.digests import of_tensors
from saelab.base.errors import CheckpointError, SaelabError
from saelab.dashboards.result import Dashboard
from saelab.dashboards.writing import bundle
from saelab.interop.given import Given
from saelab.interop.loading import read_path
from saelab.reading.store import open_stores
from saelab.steering import replaying
from saelab.training import checkpoint
from tests import mutations, synthetic_dashboard, tiny, toy_hspace

MUTATIONS = int(os.environ.get("SAELAB_MUTATIONS", 360))
MORE_MEMORY = 400 * 2**20  # beside what the process has: a hundred times the largest file
SAES = {
    "topk": saelab.TopK(k=2, d_sae=16),
    "jumprelu": saelab.JumpReLU(target_l0=2, d_sae=16),
    "gated": saelab.Gated(l1=0.1, d_sae=16),
    "transcoder": saelab.Transcoder(of=saelab.TopK(k=2, d_sae=16), skip=True),
    "choice": saelab.FeatureChoice(k=2, d_sae=16),
}


class Killed(Exception):
    pass


class Kill:
    """A logger that ends a run at its so-manieth row."""

    def __init__(self, rows):
        self.left = rows

    def log(self, row):
        self.left -= 1
        if not self.left:
            raise Killed

    def close(self):
        pass


def train(out, **more):
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    return saelab.train(
        x, sae=saelab.TopK(k=2, d_sae=16), tokens=2048, batch_size=128, log_every=128, checkpoint_every=256, out=out,
        progress=False, **more,
    )  # fmt: skip


def sae_content(sae):
    x = torch.randn(3, sae.d_in, generator=torch.Generator().manual_seed(0))
    return (
        type(sae.cfg),
        sae.encode(x).tolist() if sae.cfg.usable(sae.state) else None,
        of_tensors(sae.state_dict()),
    )


def run_content(path):
    run = saelab.load_run(path)
    repr(run), run.history
    return sae_content(run.sae)


def store_content(path):
    found = []
    for store in open_stores(path).values():
        store.verify()
        columns = {name: getattr(store, name) for name in ("tokens", "documents", "contexts")}
        found.append(of_tensors({"x": store[:], **columns}))
    return found


def trajectory_content(path):
    made = hspace.Trajectory.load(path)
    return repr(made), of_tensors({k: v for k, v in vars(made[:1]).items() if torch.is_tensor(v)})


def directions_content(path):
    made = hspace.Directions.load(path)
    return repr(made), repr(made[0]), made.to_pandas().to_csv()


def sweep_content(path):
    sweep = steering.load_sweep(path)
    return len(sweep), list(sweep.to_pandas().columns)


def dashboard_content(path):
    data = Dashboard(path).data
    for sae in data.manifest["saes"]:
        for _columns, _ends in data.pages(sae):
            pass
    return sorted(data.containers)


FOREIGN = {
    "saelens": "sae-lens/batchtopk_checkpoint", "dictionary_learning": "dictionary-learning/MatryoshkaBatchTopKSAE/trainer_0",
    "sparsify": "sparsify/skip_sae/layers.1", "llama": "published/fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L1R-8x",
    "gemma": "published/google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82",
    "gemma 2": "published/google/gemma-scope-2-1b-pt/resid_post/layer_1_width_16k_l0_small",
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> (path, what reads it)."""
    root, made = tmp_path_factory.mktemp("sources"), {}
    for name, cfg in SAES.items():
        saelab.SAE(cfg, 8, {"site": "blocks.0.hook_resid_post", "seed": 0, "context_length": 16}).save(root / name)
        made[name] = (root / name, lambda path: sae_content(saelab.SAE.load(path)))
    with pytest.raises(Killed):
        train(root / "killed", loggers=[Kill(9)])
    assert len(list((root / "killed" / "checkpoints").iterdir())) == 2
    train(root / "finished")
    made |= {"killed": (root / "killed", run_content), "finished": (root / "finished", run_content)}
    lm = saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer(), device="cpu")
    sites = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]
    corpus = saelab.load_corpus([f"the state of the union {i}" for i in range(20)])
    saelab.harvest(lm, corpus, sites=sites, tokens=100, context_length=8, out=root / "store", progress=False)
    made["store"] = (root / "store", store_content)
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    sae = saelab.train(x, sae=saelab.TopK(k=4, d_sae=16), tokens=512, batch_size=128, progress=False).sae
    sae.metadata["site"] = "blocks.1.hook_resid_post"
    live = sae.latent_stats.density.topk(2).indices.tolist()
    how = {"draws": 1, "max_new_tokens": 4, "progress": False}
    with warnings.catch_warnings(action="ignore"):
        steering.sweep(lm, sae, live, ["add"], [1.0], ["The state"], out=root / "sweep", **how)
    made["sweep"] = (root / "sweep", sweep_content)
    with lm.steer(steering.add(sae, live[0], strength=1.0)) as receipt:
        lm.generate("The state", max_new_tokens=3)
    receipt.save(root / "receipt.json")
    made["receipt"] = (root / "receipt.json", lambda path: len(replaying.replay(path, lm, [sae])))
    for name, file in (("bundle", "bundle"), ("page", "page.html")):
        arguments = dict(d_sae=8, pages=2, per_chunk=2)
        bundle.write(root / file, synthetic_dashboard.chunks(**arguments), synthetic_dashboard.manifest(**arguments))
        made[name] = (root / file, dashboard_content)
    trajectory = toy_hspace.planted(torch.randn(4, 3, *toy_hspace.SHAPE))
    trajectory.save(root / "trajectory.safetensors")
    hspace.pca(trajectory, components=2).save(root / "directions.safetensors")
    made["trajectory"] = (root / "trajectory.safetensors", trajectory_content)
    made["directions"] = (root / "directions.safetensors", directions_content)
    golden = Path(__file__).parents[1] / "interop" / "golden"
    for name, where in FOREIGN.items():
        shutil.copytree(golden / where, root / name, ignore=shutil.ignore_patterns("golden.safetensors"))
        made[name] = (
            root / name,
            lambda path: sae_content(read_path(path, given=Given(site="blocks.0.hook_resid_post", k=2))),
        )
    return made


@contextlib.contextmanager
def bounded():
    """No more than ten seconds, and no more memory than so much beside what there is."""

    def hangs(*arguments):
        raise TimeoutError("hangs")

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, hangs)
    signal.alarm(10)
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


CHECKSUMMED = (*SAES, "killed", "store", "bundle", "page", "trajectory", "directions")
NAMES = (*CHECKSUMMED, "finished", "sweep", "receipt", *FOREIGN)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_file_is_read_as_it_was_or_refused(sources, tmp_path, name):
    source, read = sources[name]
    wanted = [read(source)]
    if name == "killed":  # a damaged checkpoint is passed over: the one before it serves too
        shutil.copytree(source, tmp_path / "older")
        shutil.rmtree(max((tmp_path / "older" / "checkpoints").iterdir()))
        wanted.append(read(tmp_path / "older"))
    refused, raw = 0, []
    for i in range(-(-MUTATIONS // len(NAMES))):
        target = tmp_path / f"x{source.suffix}"
        what = mutations.mutate(source, target, mutations.generator(name, i))
        try:
            with warnings.catch_warnings(action="always", record=True) as said, bounded():
                found = read(target)
            missing = any("has no saelab.safetensors" in str(warning.message) for warning in said)
            if name in CHECKSUMMED and "signed" not in what and found not in wanted and not missing:
                raw.append((i, what, "another content, silently"))
        except SaelabError as error:
            assert str(error)
            refused += 1
        except Exception as error:
            raw.append((i, what, f"{type(error).__name__}: {str(error)[:200]}"))
        shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)
    print(f"{name}: {i + 1} mutations, {refused} refused, {len(raw)} wrong")
    assert not raw, "\n".join(map(str, raw))
    assert refused


def test_a_wrong_type_in_the_newest_checkpoint_goes_back_to_the_one_before(sources, tmp_path):
    source, _ = sources["killed"]
    changes = [
        lambda m: m.update(step="many"), lambda m: m.update(files=None), lambda m: m.update(files={}),
        lambda m: m.pop("step"), lambda m: m["files"].update({"../x": m["files"]["history.json"]}),
    ]  # fmt: skip
    for i, change in enumerate(changes):
        folder = tmp_path / str(i)
        shutil.copytree(source, folder)
        older, newest = sorted((folder / "checkpoints").iterdir())
        manifest = json.loads((newest / "manifest.json").read_text())
        change(manifest)
        (newest / "manifest.json").write_text(json.dumps(manifest))
        with pytest.warns(UserWarning, match="going back to the checkpoint before it"):
            step, _, _ = checkpoint.load_latest(folder)
        assert older.name.endswith(str(step))
        (older / "manifest.json").write_text("[]")
        with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no checkpoint .* is whole"):
            checkpoint.load_latest(folder)
