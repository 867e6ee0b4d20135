"""QuickSelection as a scikit-learn selector."""

import hashlib
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np

from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.base.files import user_path
from saelab.base.locks import locked
from saelab.base.surroundings import OwnRandomness
from saelab.selection.autoencoder import Autoencoder, Recipe
from saelab.selection.runs import FINISHED, Folder, Run, Stability, aggregated, ranking_of
from saelab.selection.samples import Samples, check_samples

try:
    with OwnRandomness(0):  # scikit-learn's first import draws from Python's generator
        from sklearn.base import BaseEstimator
        from sklearn.feature_selection import SelectorMixin
        from sklearn.utils import check_random_state
        from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("QuickSelection needs scikit-learn 1.6 or newer: pip install 'saelab[selection]'") from error

EPSILON = 13.0
CHOICES = {
    "output": ("linear", "tanh"),
    "scale": ("standard", "minmax", None),
    "topology": ("set", "static", "dense"),
    "strength": ("input", "output", "both", "degree"),
    "aggregate": ("last", "sum"),
}


class QuickSelection(SelectorMixin, BaseEstimator):
    """Unsupervised feature selection by the strength of input neurons of a sparse denoising autoencoder.

    The autoencoder's links are few and evolve: after each epoch the weakest are dropped and as many are drawn at random
    (SET). Features that help to reconstruct the others gather strong links; one run ranks them all. Source: Atashgahi et al.,
    "Quick and Robust Feature Selection: the Strength of Energy-efficient Sparse Training for Autoencoders", Machine Learning
    111 (2022), and the authors' code, whose defaults these are; "the paper" and "the code" are by our notes of them. Measured
    (`benchmarks/results/quickselection.md`): ahead of random features on Madelon, digits and MNIST; on planted data by the
    accuracy of trees, and not told apart by k-means; on Isolet and Fashion-MNIST (there by k-means only) after further draws,
    and below random on Isolet with 10 epochs.

    Args:
        n_features_to_select: how many features `transform` keeps; None is half of them.
        n_hidden: hidden units.
        epsilon: sparsity: epsilon (d + n_hidden) links are drawn for each layer. None is 13, the paper's, or what makes the
            density 1 where the features are so few that 13 would be above it (our choice).
        zeta: share of the positive and of the negative links of a layer that each epoch replaces.
        noise_factor: the input is x + noise_factor * (normal noise).
        resample_noise: draw the noise anew for each epoch, as denoising autoencoders usually do; the code draws it once.
        dropout: share of hidden units left out at each step (in the code, not in the paper). Those left out still learn, as in
            the code, and the ranking needs it: with 0, features that vary in few samples can take nearly all of the top.
        output: "linear", or "tanh", the paper's for Madelon.
        scale: "standard" (zero mean, unit variance), "minmax" ([0, 1], the paper's for gene expression and text) or None.
        lr, momentum, weight_decay: of the optimiser; the decay is decoupled and not multiplied by `lr`.
        batch_size: samples a step; fewer samples than that make one batch, with a warning.
        epochs: passes over the samples. The ranking is read in the last but one, before new links are drawn, as in the code.
        topology: "set", "static" (the first links stay) or "dense" (fully connected, an ablation: makes [d, n_hidden] arrays).
        strength: sum of the absolute weights of a feature's links into the hidden units ("input", the paper's), of those
            back to it ("output"), of "both", or the number of the former ("degree").
        aggregate: rank by the strength of the "last" epoch, or by the "sum" over all (better in a follow-up of the paper).
        patience: stop once the features to select have been stable for so many epochs; None trains all epochs (our choice).
        min_overlap: what stable means: the share of the features to select that were selected in the epoch before too.
        out: a folder for the run. The same call continues it after Ctrl-C or a kill, to the same bits, and returns it when it
            is finished; other data or arguments are an error.
        random_state: an integer makes the ranking repeat, on one machine with one number of threads.
        progress: a progress bar, for fits over two seconds.

    Attributes:
        ranking_: indices of the features [d], best first. Unlike that of scikit-learn's RFE, whose `ranking_` is our `rank_`.
        rank_: the rank of each feature [d], 1 for the best.
        strength_: what the features are ranked by [d].
        strength_history_: strength after each epoch but the last [epochs - 1, d].
        loss_history_: 1/2 ||x - x_hat||^2 of a sample, mean over each epoch.
        sparse_weights_: (W_in [d, n_hidden], W_out [n_hidden, d]), SciPy CSR arrays.
        constant_features_: mask [d]. Constant features, and those that vary by rounding only, have strength 0 and the lowest
            ranks, which a warning says.
        n_parameters_, n_epochs_, interrupted_, n_features_to_select_, n_features_in_, feature_names_in_.

    The first Ctrl-C finishes the epoch and leaves a fitted selector; a second one raises.

    Raises `DataError` (fewer than two samples; NaN or infinity; a loss that diverges), `ConfigError` (more features asked for
    than there are; a density above 1; any other argument that cannot work) and `CheckpointError` (`out`).

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(1000, 200))
    >>> X[:, :20] = rng.normal(size=(1000, 3)) @ rng.normal(size=(3, 20))  # twenty features that tell of each other
    >>> selector = QuickSelection(20, n_hidden=200, epochs=20, random_state=0).fit(X)
    >>> selector.transform(X).shape, bool((selector.top(20) < 20).mean() > 0.7)
    ((1000, 20), True)
    """

    def __init__(
        self,
        n_features_to_select: int | None = None,
        *,
        n_hidden: int = 1000,
        epsilon: float | None = None,
        zeta: float = 0.2,
        noise_factor: float = 0.2,
        resample_noise: bool = False,
        dropout: float = 0.2,
        output: str = "linear",
        scale: str | None = "standard",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        batch_size: int = 100,
        epochs: int = 100,
        topology: str = "set",
        strength: str = "input",
        aggregate: str = "last",
        patience: int | None = None,
        min_overlap: float = 0.95,
        out: Any = None,
        random_state: Any = None,
        progress: bool = True,
    ) -> None:
        self.n_features_to_select = n_features_to_select
        self.n_hidden = n_hidden
        self.epsilon = epsilon
        self.zeta = zeta
        self.noise_factor = noise_factor
        self.resample_noise = resample_noise
        self.dropout = dropout
        self.output = output
        self.scale = scale
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.epochs = epochs
        self.topology = topology
        self.strength = strength
        self.aggregate = aggregate
        self.patience = patience
        self.min_overlap = min_overlap
        self.out = out
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> "QuickSelection":
        """Train on samples [n, d] (array, data frame or SciPy sparse matrix) and rank the features; `y` is not read."""
        self._check_arguments()
        X = self._checked(X)
        n, d = X.shape
        k, epsilon, batch_size = self._n_selected(d), self._epsilon(d), self._batch_size(n)
        # without a random_state, the numbers of the system: NumPy's global ones are the user's
        random = np.random.RandomState() if self.random_state is None else check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        recipe = Recipe(
            self.lr, self.momentum, self.weight_decay, self.dropout, self.output == "tanh",
            self.zeta if self.topology == "set" else None,
        )  # fmt: skip
        stability = None if self.patience is None else Stability(self.patience, self.min_overlap, k, self.aggregate)
        make = Autoencoder.dense if self.topology == "dense" else Autoencoder.sparse
        run = Run(make(d, self.n_hidden, epsilon, seed), seed, self.epochs, self.strength)

        folder = None if self.out is None else Folder(user_path(self.out), self._fingerprint(X, seed, k))
        if folder is not None:
            folder.load(run)
        # to give what is finished back, nothing need be writable
        with nullcontext() if folder is None or run.ended in FINISHED else locked(folder.path.parent):
            if folder is not None:
                folder.load(run)
            samples = Samples(
                X, scale=self.scale, noise_factor=self.noise_factor, resample=self.resample_noise,
                batch_size=batch_size, seed=run.seed,
            )  # fmt: skip
            if run.ended not in FINISHED:
                run.train(samples, recipe, stability, folder, self.progress)
        self.n_features_to_select_ = k
        self._keep(run, samples.constant_D)
        return self

    def top(self, k: int) -> np.ndarray:
        """Indices of the `k` best features, best first; one fit serves every k."""
        check_is_fitted(self)
        if not 0 <= k <= self.n_features_in_:
            raise ConfigError(
                f"the top {k:,} of {self.n_features_in_:,} features: ask for 0 to {self.n_features_in_:,}"
            )
        return self.ranking_[:k]

    def _get_support_mask(self) -> np.ndarray:
        check_is_fitted(self)
        return self.rank_ <= self.n_features_to_select_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _keep(self, run: Run, constant_D: np.ndarray) -> None:
        self.strength_history_ = np.array(run.strengths)
        self.strength_ = aggregated(run.strengths, self.aggregate)
        # among features of no strength, the constant ones come last
        self.ranking_ = ranking_of(np.where(constant_D, -1.0, self.strength_))
        self.rank_ = np.empty_like(self.ranking_)
        self.rank_[self.ranking_] = np.arange(1, len(self.ranking_) + 1)
        self.constant_features_ = constant_D
        self.loss_history_ = np.array(run.losses)
        layer_in, layer_out = run.model.layers
        self.sparse_weights_ = layer_in.to_scipy(), layer_out.to_scipy().T.tocsr()
        self.n_parameters_ = run.model.n_parameters()
        self.n_epochs_, self.interrupted_ = len(run.losses), run.ended == "interrupted"
        if constant_D.any():
            warnings.warn(
                f"{constant_D.sum():,} of {len(constant_D):,} features are constant: they have strength 0 and the lowest ranks",
                stacklevel=3,
            )
        if self.interrupted_:
            go_on = "the same call continues it" if self.out is not None else "with `out` it could be continued"
            warnings.warn(f"interrupted after {self.n_epochs_:,} of {self.epochs:,} epochs: {go_on}", stacklevel=3)

    def _checked(self, X: Any) -> Any:
        try:
            X = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], ensure_all_finite=False)
        except ValueError as error:
            raise DataError(str(error)) from error
        check_samples(X, getattr(self, "feature_names_in_", None))
        return X

    def _check_arguments(self) -> None:
        for name, choices in CHOICES.items():
            checks.choice(name, getattr(self, name), choices)
        for name in ("n_hidden", "batch_size", "epochs", "patience"):
            if not (name == "patience" and self.patience is None):
                checks.count(name, getattr(self, name))
        for name in ("zeta", "dropout", "momentum", "weight_decay"):
            checks.number(name, getattr(self, name), least=0, below=1)
        checks.number("min_overlap", self.min_overlap, above=0, most=1)
        checks.number("lr", self.lr, above=0)
        checks.number("noise_factor", self.noise_factor, least=0)

    def _n_selected(self, d: int) -> int:
        k = self.n_features_to_select
        if k is None:
            return max(1, d // 2)
        return checks.count("n_features_to_select", k, most=d, of="the features")

    def _epsilon(self, d: int) -> float:
        limit = d * self.n_hidden / (d + self.n_hidden)
        if self.epsilon is None:
            return min(EPSILON, limit)
        if not 0 < checks.number("epsilon", self.epsilon) <= limit:
            raise ConfigError(
                f"epsilon {self.epsilon:g} on {d:,} features and {self.n_hidden:,} hidden units is a density of "
                f"{self.epsilon / limit:.3g}; it must be above 0 and at most 1: epsilon up to {limit:.4g}, or None"
            )
        return float(self.epsilon)

    def _batch_size(self, n: int) -> int:
        if n < self.batch_size:
            warnings.warn(
                f"{n:,} samples are fewer than batch_size {self.batch_size:,}: they make one batch", stacklevel=3
            )
        return min(self.batch_size, n)

    def _fingerprint(self, X: Any, seed: int, k: int) -> dict[str, Any]:
        digest = hashlib.sha256()
        for array in [X] if isinstance(X, np.ndarray) else [X.data, X.indices, X.indptr]:
            digest.update(np.ascontiguousarray(array).data)
        arguments = {name: _plain(value) for name, value in self.get_params(deep=False).items()}
        for name in ("out", "progress", "n_features_to_select", "min_overlap", "aggregate"):
            arguments.pop(name)  # what training does not depend on
        if self.patience is not None:
            arguments |= {"n_features_to_select": k, "min_overlap": self.min_overlap, "aggregate": self.aggregate}
        # without a random_state the folder's own seed goes on
        arguments["random_state"] = None if self.random_state is None else seed
        return arguments | {"samples": X.shape[0], "features": X.shape[1], "data": digest.hexdigest()}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
