"""What quickselection.py runs in processes of their own: a ranking with its scores, and probes of cost."""

import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import selection_data

QUICK = {
    "QuickSelection": {},
    "QuickSelection, 10 epochs": {"epochs": 10},
    "QuickSelection, 500 epochs": {"epochs": 500},
    "summed strength": {"aggregate": "sum"},
    "fresh noise": {"resample_noise": True},
    "static topology": {"topology": "static"},
    "dense twin": {"topology": "dense"},
    "output strength": {"strength": "output"},
    "both strengths": {"strength": "both"},
    "degree": {"strength": "degree"},
}


def rank(method: str, data: selection_data.Data, seed: int, epochs: int) -> tuple[np.ndarray, int | None]:
    """(features, best first, and the number of parameters trained, if any)."""
    from saelab.selection.baselines import laplacian_score, mcfs

    d = data.x_train.shape[1]
    if method in QUICK:
        from saelab import QuickSelection

        options = {"epochs": epochs, "random_state": seed, "progress": False, **data.options, **QUICK[method]}
        selector = QuickSelection(data.k, **options).fit(data.x_train)
        return selector.top(data.k), selector.n_parameters_
    if method == "Laplacian score":
        return np.argsort(laplacian_score(data.x_train), kind="stable")[: data.k], None
    if method == "MCFS":
        scores = mcfs(data.x_train, data.k, n_clusters=len(np.unique(data.y_train)))
        return np.argsort(-scores, kind="stable")[: data.k], None
    if method == "random":
        return np.random.default_rng(seed).permutation(d)[: data.k], None
    return np.arange(d), None  # all


def scored(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each cell (data, method, seed, epochs): the accuracies of its ranking, its memory and time."""
    return [_scored(**cell) for cell in cells]


def timed(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same without accuracies."""
    return [
        _measured(selection_data.load(cell["data"], cell["seed"]), cell["method"], cell["seed"], cell["epochs"])[1]
        for cell in cells
    ]


def _scored(data: str, method: str, seed: int, epochs: int) -> dict[str, Any]:
    from saelab.selection.scoring import extra_trees_accuracy, kmeans_accuracy

    here = selection_data.load(data, seed)
    features, made = _measured(here, method, seed, epochs)
    return {
        "trees": extra_trees_accuracy(
            here.x_train, here.y_train, here.x_test, here.y_test, features, random_state=seed
        ),
        "clusters": kmeans_accuracy(here.x_train, here.y_train, features, random_state=seed),
        "recovered": "" if here.true is None or method == "all" else int(np.isin(features, here.true).sum()),
        **made,
    }


def _measured(data: selection_data.Data, method: str, seed: int, epochs: int) -> tuple[np.ndarray, dict[str, Any]]:
    """(features, their cost)."""
    warnings.filterwarnings("ignore", message=".*features are constant")
    rank(method, selection_data.toy(0), 0, 1)  # imports are nobody's cost
    before = _reset_peak()
    start = time.perf_counter()
    features, parameters = rank(method, data, seed, epochs)
    seconds, peak = time.perf_counter() - start, _peak()
    return features, {
        "parameters": "" if parameters is None else parameters,
        "peak_mib": round((peak - before) / 1024, 1),
        "seconds": round(seconds, 3),
    }


def madelon_size(small: bool) -> dict[str, Any]:
    """Seconds to fit 2,080 x 500 samples, 1,000 hidden units, 100 epochs."""
    data = selection_data.planted(0, *((300, 40) if small else (2600, 500)))
    rank("QuickSelection", selection_data.toy(0), 0, 1)
    start = time.perf_counter()
    rank("QuickSelection", data, 0, 2 if small else 100)
    return {"seconds": time.perf_counter() - start}


def wide(small: bool) -> dict[str, Any]:
    """An epoch of 1,000 samples of 20,000 features, 1,000 hidden units, and that of the dense masked twin.

    Both start from the same weights; each has one epoch to warm up. Ours is timed with pruning and regrowth, the twin
    without. Parameter memory is all that stays between steps: weights, momenta, biases, indices or masks.
    """
    import torch

    from saelab.selection.autoencoder import Autoencoder, Recipe
    from saelab.selection.dense_twin import DenseLinks
    from saelab.selection.samples import Samples
    from saelab.selection.streams import DROPOUT, stream

    n, d, h = (200, 500, 100) if small else (1000, 20_000, 1000)
    X = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
    samples = Samples(X, scale="standard", noise_factor=0.2, resample=False, batch_size=100, seed=0)
    recipe = Recipe(lr=0.01, momentum=0.9, weight_decay=1e-5, dropout=0.2, tanh=False, zeta=0.2)
    sparse, twin = Autoencoder.sparse(d, h, 13.0, 0), Autoencoder.sparse(d, h, 13.0, 0)
    twin.layers = [DenseLinks.like(layer) for layer in twin.layers]

    def epoch(model: Autoencoder, number: int, evolve: bool) -> float:
        start = time.perf_counter()
        model.train_epoch(samples.batches(number), recipe, stream(0, DROPOUT, number))
        if evolve:
            model.evolve(recipe, 0, number, "input")
        return time.perf_counter() - start

    with torch.no_grad():
        ours = [epoch(sparse, number, evolve=True) for number in (1, 2)][-1]
        dense = [epoch(twin, number, evolve=False) for number in (1, 2)][-1]
    return {"seconds": ours, "twin_seconds": dense, "bytes": held_bytes(sparse), "twin_bytes": held_bytes(twin)}


def huge(small: bool) -> dict[str, Any]:
    """The peak of the whole process, data and imports included, in two epochs of 1,000 x 200,000 float32 samples."""
    from saelab import QuickSelection

    n, d = (200, 2000) if small else (1000, 200_000)
    X = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
    start = time.perf_counter()
    QuickSelection(50, epochs=2, random_state=0, progress=False).fit(X)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def kernels(small: bool) -> list[dict[str, Any]]:
    """Nanoseconds per link of each way to do the three products of a step, 100 samples in fp32: the best of five rounds."""
    import torch

    from saelab.selection.links import Links

    found = []
    for d in (50,) if small else (500, 20_000):
        links = Links.random(d, 1000, 13.0, np.random.default_rng(0))
        ways = _ways(links, torch.randn(d, 100), torch.randn(1000, 100))
        for (product, way), run in ways.items():
            seconds = min(_seconds(run) for _ in range(5))
            found.append({"features": d, "product": product, "way": way, "ns": 1e9 * seconds / len(links)})
    return found


def _ways(links: Any, x_DB: Any, h_HB: Any) -> dict[tuple[str, str], Callable[[], Any]]:
    import torch

    from saelab.kernels.sparse import sampled_product

    matrix = links.to_scipy()
    transposed = matrix.T.tocsr()
    x, h = x_DB.numpy(), h_HB.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that its CSR tensors are in beta
        csr, csr_transposed = (
            torch.sparse_csr_tensor(m.indptr, m.indices, m.data, m.shape) for m in (matrix, transposed)
        )
    rows, columns = links.codes.rows().numpy(), links.codes.indices.numpy()

    def gathered() -> np.ndarray:
        parts = [slice(start, start + 2**18) for start in range(0, len(rows), 2**18)]
        return np.concatenate([np.einsum("lb,lb->l", x[rows[part]], h[columns[part]]) for part in parts])

    return {
        ("to the features", "embedding_bag"): lambda: links.to_features(h_HB),
        ("to the features", "SciPy CSR"): lambda: matrix @ h,
        ("to the features", "torch CSR"): lambda: csr @ h_HB,
        ("to the hidden units", "embedding_bag"): lambda: links.to_hidden(x_DB),
        ("to the hidden units", "SciPy CSR"): lambda: transposed @ x,
        ("to the hidden units", "torch CSR"): lambda: csr_transposed @ x_DB,
        ("gradient of the links", "sampled_addmm"): lambda: sampled_product(x_DB, h_HB, links.codes),
        ("gradient of the links", "gathers and einsum"): gathered,
    }


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def held_bytes(model: Any) -> int:
    """Bytes of every distinct tensor and array that a model and its layers hold."""
    import torch

    found: dict[int, int] = {}
    stack = [model, *model.layers]
    while stack:
        for value in vars(stack.pop()).values():
            if isinstance(value, torch.Tensor):
                found[value.data_ptr()] = value.numel() * value.element_size()
            elif isinstance(value, np.ndarray):
                found[value.ctypes.data] = value.nbytes
            elif isinstance(value, tuple) and hasattr(value, "_asdict"):
                found |= {part.data_ptr(): part.numel() * part.element_size() for part in value}
            elif type(value).__name__ == "SparseCodes":
                stack.append(value)
    return sum(found.values())


def _reset_peak() -> int:
    """Forget the peak of this process so far (Linux); KiB in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))
