"""What latents fire on in words, and how well the words tell where they fire on text that was not read for them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Bool, Int

from saelab.autoencoders.sae import SAE
from saelab.base import checks
from saelab.base.progress import progress_bar
from saelab.evaluation.rules import ReadTokens, learn_rules
from saelab.models.purpose import Purpose
from saelab.reading.corpus import contexts_for
from saelab.reading.reader import ContextReader

if TYPE_CHECKING:
    import pandas as pd

    from saelab.models.language import LanguageModel

WINDOW = 32  # tokens
Z = 1.959964


class Explanation(Protocol):
    """A text, and where it says that the latent fires."""

    @property
    def text(self) -> str: ...

    def matches(self, ids: Int[np.ndarray, "n pos"]) -> Bool[np.ndarray, "n pos"]: ...


def explain(
    sae: SAE,
    lm: "LanguageModel",
    corpus: Any,
    latents: Sequence[int],
    *,
    explainer: Callable[[ReadTokens, Bool[np.ndarray, "n pos"]], Explanation] = learn_rules,
    tokens: int = 200_000,
    batch_size: int = 8,
    split: str = "train",
    progress: bool = True,
) -> dict[int, Explanation]:
    """What each of some latents fires on, by latent.

    Args:
        sae: with the site and the context length that it was trained at in its metadata.
        lm: the model that it is for.
        corpus: what `load_corpus` gives or takes.
        latents: their numbers.
        explainer: makes an explanation of what was read and of where the latent fires (bool [contexts, position]). Rules
            (`saelab.evaluation.rules`) need no other model.
        tokens: up to so many go through the model.
        batch_size, split, progress: as for `evaluate`.

    Raises `ConfigError` for a latent that the SAE has not, and as `evaluate` does.

    >>> saelab.explain(sae, lm, "sotu", [3])[3].text  # doctest: +SKIP
    "' war'; ' peace' after ' of'"
    """
    read, fires = _read(sae, lm, corpus, latents, tokens, batch_size, split, progress)
    return {latent: explainer(read, fired) for latent, fired in fires.items()}


def score(
    explanations: Mapping[int, Explanation],
    sae: SAE,
    lm: "LanguageModel",
    corpus: Any,
    *,
    examples: int = 50,
    tokens: int = 200_000,
    seed: int = 0,
    batch_size: int = 8,
    split: str = "heldout",
    progress: bool = True,
) -> "ExplanationScores":
    """How well explanations tell where latents fire, on held-out windows of 32 tokens.

    *Detection*: does the latent fire anywhere in a window? *Fuzzing*: does it fire at the token marked? Both are balanced
    accuracies over as many examples that fire as ones that do not, half of the latter near misses where there are such: they
    hold a token on which the latent fires elsewhere.

    Args:
        explanations: what `explain` gives.
        sae, lm, corpus, batch_size, split, progress: as for `explain`.
        examples: at most so many of each class.
        tokens: up to so many go through the model.
        seed: of the choice of examples.

    Raises `ConfigError` for a latent that the SAE has not, and as `evaluate` does.

    >>> saelab.score(explanations, sae, lm, "sotu").to_pandas()  # doctest: +SKIP
    """
    examples, seed = checks.count("examples", examples), checks.seed(seed)
    read, fires = _read(sae, lm, corpus, list(explanations), tokens, batch_size, split, progress)
    rows = []
    for latent, fired in fires.items():
        said = explanations[latent].matches(read.ids) & read.counted
        chance = np.random.default_rng([seed, latent])
        row: dict[str, Any] = {"latent": latent, "text": explanations[latent].text}
        rows.append(
            row | _detection(read, fired, said, examples, chance) | _fuzzing(read, fired, said, examples, chance)
        )
    return ExplanationScores(rows)


@dataclass(frozen=True)
class ExplanationScores:
    """Balanced accuracies of explanations, with 95 % intervals; NaN where a latent has no example of a class.

    >>> ExplanationScores([{"latent": 3, "text": "' war'", "detection": 0.9}]).labels
    {3: ("' war'", 0.9, 'saelab, detection')}
    """

    rows: list[dict[str, Any]]

    def to_pandas(self) -> "pd.DataFrame":
        """A row a latent: of both the score, `_low`, `_high`, `_near` (near misses told right), `_examples`."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    @property
    def labels(self) -> dict[int, tuple[str, float | None, str]]:
        """Texts with their scores in detection, as `dashboards.build(labels=)` takes them."""
        return {
            row["latent"]: (row["text"], None if np.isnan(row["detection"]) else row["detection"], "saelab, detection")
            for row in self.rows
        }


def balanced_accuracy(
    right_firing: Bool[np.ndarray, " n"], right_silent: Bool[np.ndarray, " m"]
) -> tuple[float, float, float]:
    """Mean of the shares told right in each class, and its 95 % interval: Wilson's of each, joined as Newcombe does.

    Newcombe, Statistics in Medicine 17 (1998) 873, method 10, for the mean in place of the difference. Examples count as
    independent.

    >>> [round(x, 3) for x in balanced_accuracy(np.ones(50, bool), np.ones(50, bool))]
    [1.0, 0.95, 1.0]
    """
    if not len(right_firing) or not len(right_silent):
        return (float("nan"),) * 3
    shares, below, above = np.array([_wilson(right) for right in (right_firing, right_silent)]).T
    middle = float(shares.mean())
    low, high = (float(np.sqrt(np.square(shares - edge).sum())) / 2 for edge in (below, above))
    return middle, middle - low, middle + high


def _wilson(right: Bool[np.ndarray, " n"]) -> tuple[float, float, float]:
    n, share = len(right), float(right.mean())
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return share, min(middle - half, share), max(middle + half, share)


def _read(
    sae: SAE,
    lm: "LanguageModel",
    corpus: Any,
    latents: Sequence[int],
    tokens: int,
    batch_size: int,
    split: str,
    progress: bool,
) -> tuple[ReadTokens, dict[int, Bool[np.ndarray, "n pos"]]]:
    """The contexts read, and where in them each latent fires."""
    checks.autoencoder("sae", sae), checks.language_model("lm", lm)
    latents = checks.counts("latents", latents, least=0, most=sae.d_sae - 1, of="the SAE's last latent")
    purpose = Purpose.of(sae)
    contexts = contexts_for(sae, lm, corpus, split, progress=progress)
    reader = ContextReader.of(purpose, lm, contexts, checks.count("tokens", tokens), batch_size)
    ids = contexts.ids[: len(reader.order)].numpy()
    counted, fires = np.zeros(ids.shape, bool), {latent: np.zeros(ids.shape, bool) for latent in latents}
    with progress_bar(len(reader.order), "reading the corpus", "context", progress) as bar:
        for rows, codes in reader.coded(purpose):
            where = rows.contexts.numpy(), rows.positions.numpy()
            counted[where] = True
            indices = codes.indices.cpu().numpy()
            row_of = np.repeat(np.arange(len(rows)), np.diff(codes.offsets.cpu().numpy()))
            for latent, fired in fires.items():
                mine = row_of[indices == latent]
                fired[where[0][mine], where[1][mine]] = True
            bar.update(rows.cursor - bar.n)
    return ReadTokens(ids, counted, lm.token_text), fires


def _windows(places: Bool[np.ndarray, "n pos"]) -> Bool[np.ndarray, "windows width"]:
    """Contexts cut into windows, the last of each filled up with False."""
    padded = np.pad(places, ((0, 0), (0, -places.shape[1] % WINDOW)))
    return padded.reshape(-1, WINDOW)


def _like(read: ReadTokens, fired: Bool[np.ndarray, "n pos"]) -> Bool[np.ndarray, "n pos"]:
    """Counted places where the latent is silent on a token on which it fires elsewhere."""
    return read.counted & ~fired & np.isin(read.ids, np.unique(read.ids[fired]))


def _detection(
    read: ReadTokens,
    fired: Bool[np.ndarray, "n pos"],
    said: Bool[np.ndarray, "n pos"],
    most: int,
    chance: np.random.Generator,
) -> dict[str, Any]:
    firing, near, read_at, said_in = (
        np.any(_windows(x), axis=1, keepdims=True).ravel() for x in (fired, _like(read, fired), read.counted, said)
    )
    silent = read_at & ~firing
    return _told("detection", firing, silent, near & silent, said_in, most, chance)


def _fuzzing(
    read: ReadTokens,
    fired: Bool[np.ndarray, "n pos"],
    said: Bool[np.ndarray, "n pos"],
    most: int,
    chance: np.random.Generator,
) -> dict[str, Any]:
    within = np.any(_windows(fired), axis=1, keepdims=True)
    near = _windows(_like(read, fired))
    silent = (_windows(read.counted & ~fired) & within) | near
    return _told("fuzzing", _windows(fired).ravel(), silent.ravel(), near.ravel(), _windows(said).ravel(), most, chance)


def _told(
    name: str,
    firing: np.ndarray,
    silent: np.ndarray,
    near: np.ndarray,
    said: np.ndarray,
    most: int,
    chance: np.random.Generator,
) -> dict[str, Any]:
    """The score over as many examples of each class, half of the silent ones near misses."""
    n = min(most, int(firing.sum()), int(silent.sum()))
    near_at, far_at = np.flatnonzero(near), np.flatnonzero(silent & ~near)
    n_near = min(max(n // 2, n - len(far_at)), len(near_at))
    firing_at = chance.choice(np.flatnonzero(firing), n, replace=False)
    near_at = chance.choice(near_at, n_near, replace=False)
    far_at = chance.choice(far_at, n - n_near, replace=False)
    middle, low, high = balanced_accuracy(said[firing_at], ~said[np.concatenate([near_at, far_at])])
    told = float((~said[near_at]).mean()) if n_near else float("nan")
    return {name: middle, f"{name}_low": low, f"{name}_high": high, f"{name}_near": told, f"{name}_examples": n}
