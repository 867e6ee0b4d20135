"""The rows that quality.py trains and scores on: harvested once into .cache/, one shuffled order for all libraries.

For each site `train.npy` and `heldout.npy` hold float32 rows; for each set of rows ("all", "ordinary": at most 4 times
the median norm) an index file holds their order: training rows first, then validation rows.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import workers
from drivers.protocol import synthetic_rows

SITES = ("blocks.3.hook_resid_post", "blocks.2.attn.hook_z")
MAX_NORM = 4.0
FEW = 1e-4
VALIDATION = 12 * 4096
HELDOUT = 100_000
CHUNK = 8192


@dataclass(frozen=True)
class Data:
    """One site and set of rows, as files, and the numbers that the report quotes."""

    site: str
    rows: str
    d_in: int
    train_rows: str
    train_order: str
    n_train: int
    n_validation: int
    heldout_rows: str
    heldout_order: str
    n_heldout: int
    unit_scale: float
    median_norm: float
    high_norm_rows: float
    high_norm_variance: float

    def describe(self) -> str:
        """One line for the report."""
        return (
            f"{self.n_train:,} training, {self.n_validation:,} validation, {self.n_heldout:,} held-out rows of width "
            f"{self.d_in}; median norm {self.median_norm:.3g}, {self.high_norm_rows:.2%} of all rows above "
            f"{MAX_NORM:g} times it, with {self.high_norm_variance:.1%} of the variance; unit mean square is raw times "
            f"{self.unit_scale:.4g}"
        )


def harvested(n_train: int, sites: list[str], row_sets: list[str]) -> list[Data]:
    """Real activations of SmolLM2 on the speeches, position 0 left out; made on the first call."""
    folders = {site: workers.CACHE / "quality" / f"{site}-{n_train}" for site in sites}
    missing = [site for site, folder in folders.items() if not (folder / "origin.json").exists()]
    if missing:
        harvest(missing, folders, int(1.03 * (n_train + VALIDATION)))  # 1.6% of the rows are high-norm at blocks.3
    datasets = [orders(folders[site], site, rows, n_train) for site in sites for rows in row_sets]
    # Where next to no row is high-norm (hook_z), the two sets are one.
    same = "all" in row_sets
    return [data for data in datasets if not (same and data.rows == "ordinary" and data.high_norm_rows < FEW)]


def harvest(sites: list[str], folders: dict[str, Path], n_rows: int) -> None:
    """One pass over each split for all sites, written as .npy."""
    import saelab

    lm, corpus = saelab.load_model("smollm2-135m"), saelab.load_corpus("sotu", seed=0)
    for split, tokens in (("train", n_rows), ("heldout", HELDOUT)):
        store_folder = workers.CACHE / "quality" / f"stores-{split}"
        stores = saelab.harvest(lm, corpus, sites=sites, tokens=tokens, split=split, out=store_folder, skip_positions=1)
        assert isinstance(stores, dict)
        for site in sites:
            folders[site].mkdir(parents=True, exist_ok=True)
            store = stores[site]
            chunks = (store[start : start + CHUNK].float().numpy() for start in range(0, len(store), CHUNK))
            write_rows(folders[site] / f"{split}.npy", len(store), store.d_in, chunks)
            if split == "heldout":
                (folders[site] / "origin.json").write_text(json.dumps(store.metadata, default=str, indent=1))
        del stores
        shutil.rmtree(store_folder)


def write_rows(path: Path, n: int, d: int, chunks: Iterable[np.ndarray]) -> None:
    """An .npy file filled chunk by chunk."""
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
    start = 0
    for chunk in chunks:
        rows[start : start + len(chunk)] = chunk
        start += len(chunk)
    assert start == n
    rows.flush()


def orders(folder: Path, site: str, rows: str, n_train: int) -> Data:
    """The shuffled order of one set of rows and its statistics, from the files of a site; kept in the folder."""
    summary = folder / f"{rows}-{n_train}.json"
    if summary.exists():
        return Data(**json.loads(summary.read_text()))
    x, heldout = (np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "heldout"))
    norms, heldout_norms = row_norms(x), row_norms(heldout)
    limit = MAX_NORM * float(np.median(norms))
    high = norms > limit
    kept = np.flatnonzero(~high) if rows == "ordinary" else np.arange(len(x))
    order = np.random.default_rng(0).permutation(kept)
    if len(order) < n_train + VALIDATION:
        raise SystemExit(f"{folder} has {len(order):,} {rows} rows; {n_train + VALIDATION:,} are needed: delete it")
    order = order[: n_train + VALIDATION]
    heldout_order = np.flatnonzero(heldout_norms <= limit) if rows == "ordinary" else np.arange(len(heldout))
    np.save(folder / f"{rows}-{n_train}-train.npy", order)
    np.save(folder / f"{rows}-heldout.npy", heldout_order)
    data = Data(
        site=site,
        rows=rows,
        d_in=x.shape[1],
        train_rows=str(folder / "train.npy"),
        train_order=str(folder / f"{rows}-{n_train}-train.npy"),
        n_train=n_train,
        n_validation=VALIDATION,
        heldout_rows=str(folder / "heldout.npy"),
        heldout_order=str(folder / f"{rows}-heldout.npy"),
        n_heldout=len(heldout_order),
        unit_scale=float((x.shape[1] / np.mean(norms[order[:n_train]] ** 2)) ** 0.5),
        median_norm=float(np.median(norms)),
        high_norm_rows=float(high.mean()),
        high_norm_variance=variance_share(x, high),
    )
    summary.write_text(json.dumps(asdict(data), indent=1))
    return data


def row_norms(x: np.ndarray) -> np.ndarray:
    """[n] float64."""
    parts = (np.linalg.norm(x[start : start + CHUNK].astype(np.float64), axis=1) for start in range(0, len(x), CHUNK))
    return np.concatenate(list(parts))


def variance_share(x: np.ndarray, chosen: np.ndarray) -> float:
    """The share of sum ||x - mean||^2 that the chosen rows hold."""
    starts = range(0, len(x), CHUNK)
    mean = sum(x[start : start + CHUNK].astype(np.float64).sum(0) for start in starts) / len(x)
    squares = np.concatenate([((x[start : start + CHUNK] - mean) ** 2).sum(1) for start in starts])
    return float(squares[chosen].sum() / squares.sum())


def synthetic(n_train: int, sites: list[str], row_sets: list[str]) -> list[Data]:
    """Made-up rows of width 64 with 2% of them ten times larger, for smoke tests without a language model."""
    folder = workers.CACHE / "quality" / f"synthetic-{n_train}"
    folder.mkdir(parents=True, exist_ok=True)
    for split, n, seed in (("train", int(1.05 * (n_train + VALIDATION)), 1), ("heldout", 20_000, 2)):
        x = synthetic_rows(n, 64, seed)
        x[::50] *= 10
        write_rows(folder / f"{split}.npy", n, 64, [x.numpy()])
    return [orders(folder, "synthetic", rows, n_train) for rows in row_sets]
