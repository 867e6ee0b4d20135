"""Is a concept split over latents, or taken over by others where they fire? Words by their first letter.

Shapes: N words, D inputs, S latents, L letters.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch.nn.functional import normalize

from saelab.base import checks
from saelab.base.errors import ConfigError
from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary
from saelab.base.seeds import named_generator
from saelab.evaluation.probes import fitted
from saelab.evaluation.scores import Score, Scores
from saelab.evaluation.text_means import controls
from saelab.models.purpose import Purpose
from saelab.models.tokens import Tokens

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.language import LanguageModel

BEFORE = "The first letter of the word"
BATCH = 64
LEAST_F1 = 0.6  # of the probe on the activation: below it the model does not know the letter here
JUMP = 0.03  # of F1, that one more latent must bring to count as a split
MOST_SPLIT = 10
ALIGNED = 0.025  # cosine of an absorbing latent's decoder row with the probe
CLEARLY_ALIGNED = 0.1  # the same, for the fraction
SHARE = 0.4  # of the activation's projection on the probe, that absorbing latents must bring
MOST_ABSORBING = 3
FIGURES = ("full absorption", "absorption fraction", "split latents", "f1 of one latent", "f1 of the probe")


@dataclass(frozen=True)
class Absorption:
    """The first letter of words that are tokens of their own, read at the word after "The first letter of the word".

    A letter has a probe on the activation, learnt from two thirds of its words against all others; where its F1 on the other
    third is at least .6, the letter counts. Its *split latents* are the latents with the largest rise of the mean code, as
    many as each raise the F1 of a probe on them by .03. On held-out words that the probe on the activation tells right:

    - "full absorption": share of the words on which none of the split latents fires, and one other latent, aligned with the
      probe (cosine .025), brings two fifths of the activation's projection on it.
    - "absorption fraction": what up to three aligned others (cosine .1) bring of the projection, beside the split latents;
      1 where these bring none, 0 where the others bring less than two fifths or the split latents all of it.
    - "split latents", "f1 of one latent" (the first of them), "f1 of the probe"; "letters", how many count.

    Means over letters, with a bootstrap over them (`n`). The controls are an SAE of random directions and an untrained one.
    `details["absorption"]` has a row a letter.

    Defined as SAEBench's absorption but for: latents are ranked by difference of means, not by a probe with an L1 penalty; the
    projection is that of x - b_dec, of which the latents are the parts; there is one prompt for all words, and it has no
    examples.

    Args:
        words: at most so many of each letter, drawn by the seed.
        seed: of the choice of words.

    >>> Absorption(words=50)
    Absorption(words=50, seed=0)
    """

    words: int = 120
    seed: int = 0
    name: ClassVar[str] = "absorption"

    def __post_init__(self) -> None:
        checks.count("words", self.words, least=6), checks.seed(self.seed)

    def run(self, saes: Mapping[str, Dictionary], lm: "LanguageModel") -> Scores:
        ids, letters = vocabulary(lm, self.words, self.seed)
        return sum((self._of(name, sae, lm, ids, letters) for name, sae in saes.items()), Scores([]))

    @torch.no_grad()
    def _of(self, name: str, sae: Dictionary, lm: "LanguageModel", ids: list[int], letters: np.ndarray) -> Scores:
        x, mine = _read(sae, lm, ids)
        x, letters = x[mine], letters[mine.numpy()]
        heldout = _every_third(letters)
        probes = probed_letters(x.double().numpy(), letters, heldout)
        scores, tables = [], []
        for source, one in {"sae": sae, **controls(sae, self.seed)}.items():
            lengths_S = one.W_dec.norm(dim=1)
            codes = (one.encode_sparse(x.to(one.W_dec)).to_dense() * lengths_S).double().cpu().numpy()
            rows = normalize(one.W_dec.double().cpu(), dim=1).numpy()
            centred = (x.double() - one.b_dec.double().cpu()).numpy()
            table = absorbed(centred, codes, rows, letters, heldout, probes)
            tables.append(table.assign(source=source))
            figures = FIGURES if source == "sae" else FIGURES[:-1]  # the last is not the autoencoder's
            scores += [Score.mean(figure, sorted(table[figure].dropna()), source=source) for figure in figures]
        scores.append(Score("letters", len(probes), float("nan"), float("nan"), len(set(letters))))
        import pandas

        return Scores.of(name, self.name, scores, pandas.concat(tables, ignore_index=True))


def vocabulary(lm: "LanguageModel", most: int, seed: int) -> tuple[list[int], Shaped[np.ndarray, " n"]]:
    """Ids of tokens that are a space and letters, at most so many of each first letter, and these letters.

    Raises `ConfigError` for a tokenizer that has no such words.
    """
    found: dict[str, list[int]] = {}
    for token in range(lm.d_vocab):
        text = lm.token_text(token)
        word = text[1:]
        if text[:1] == " " and len(word) > 2 and word.isascii() and word.isalpha():
            found.setdefault(word[0].lower(), []).append(token)
    pairs = []
    for letter, tokens in sorted(found.items()):
        order = torch.randperm(len(tokens), generator=named_generator(f"words {seed} {letter}")).tolist()
        pairs += [(tokens[place], letter) for place in order[:most]]
    enough = [letter for letter, n in Counter(letter for _, letter in pairs).items() if n >= 6]
    if len(enough) < 2:
        raise ConfigError(
            f"the vocabulary has {len(pairs)} tokens that are words, and the first-letter task needs six of each of two "
            "letters at least: leave out the task for this model"
        )
    pairs = [pair for pair in pairs if pair[1] in enough]
    return [token for token, _ in pairs], np.array([letter for _, letter in pairs])


def _read(sae: Dictionary, lm: "LanguageModel", ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation at each word [n, d_in], and whether the autoencoder is for it."""
    purpose = Purpose.of(sae)
    site = purpose.source(lm)
    before = lm.tokens_for(sae, BEFORE).ids.cpu()
    x, mine = [], []
    with progress_bar(len(ids), "reading words", "word", True) as bar:
        for start in range(0, len(ids), BATCH):
            words = torch.tensor(ids[start : start + BATCH])[:, None]
            both = torch.cat([before.expand(len(words), -1), words], 1)
            tokens = Tokens(both, torch.ones_like(both, dtype=torch.bool)).to(lm.device)
            found = lm.record(tokens, site)
            mine.append(purpose.positions(lm, found, tokens)[:, -1].cpu())
            x.append(found[:, -1].float().cpu())
            bar.update(len(words))
    return torch.cat(x), torch.cat(mine)


def _every_third(letters: np.ndarray) -> np.ndarray:
    seen: Counter[str] = Counter()
    chosen = []
    for letter in letters:
        seen[letter] += 1
        chosen.append(seen[letter] % 3 == 0)
    return np.array(chosen)


def probed_letters(
    x: Float[np.ndarray, "n d"], letters: Shaped[np.ndarray, " n"], heldout: Bool[np.ndarray, " n"]
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Of each letter that the activation tells: the probe's unit direction [d], the words told [n], and its F1."""
    found = {}
    for letter in sorted(set(letters)):
        y = letters == letter
        if not (y & heldout).any() or not (y & ~heldout).any():
            continue
        probe = fitted(x[~heldout], y[~heldout])
        told = probe(x) > 0
        if (f1 := _f1(told[heldout], y[heldout])) >= LEAST_F1:
            found[str(letter)] = probe.weights / np.linalg.norm(probe.weights), told, f1
    return found


def absorbed(
    x: Float[np.ndarray, "n d"],
    codes: Float[np.ndarray, "n s"],
    rows: Float[np.ndarray, "s d"],
    letters: Shaped[np.ndarray, " n"],
    heldout: Bool[np.ndarray, " n"],
    probes: Mapping[str, tuple[np.ndarray, np.ndarray, float]],
) -> "DataFrame":
    """A row a letter. `x` without the SAE's bias; `codes` in units of the unit `rows` of its decoder."""
    import pandas

    table = []
    for letter, (direction, told, f1) in probes.items():
        y = letters == letter
        latents, first = split_latents(codes, y, heldout)
        words = np.flatnonzero(y & heldout & told)
        cosine = rows @ direction
        brought = codes[words] * cosine
        full, fraction = _absorption(brought, codes[words], cosine, x[words] @ direction, latents)
        figures: dict[str, Any] = {
            "letter": letter,
            "full absorption": full.mean() if len(words) else np.nan,
            "absorption fraction": fraction.mean() if len(words) else np.nan,
            "split latents": len(latents),
            "f1 of one latent": first,
            "f1 of the probe": f1,
            "words": len(words),
            "latents": " ".join(map(str, latents)),
        }
        table.append(figures)
    return pandas.DataFrame(table, columns=["letter", *FIGURES, "words", "latents"])


def split_latents(
    codes: Float[np.ndarray, "n s"], y: Bool[np.ndarray, " n"], heldout: Bool[np.ndarray, " n"]
) -> tuple[list[int], float]:
    """Latents that each raise the F1 of a probe on them by .03, the first in any case, and the F1 of the first."""
    learnt = ~heldout
    rise = codes[learnt & y].mean(0) - codes[learnt & ~y].mean(0)
    order = np.argsort(-rise, kind="stable")[:MOST_SPLIT]
    f1s: list[float] = []
    for k in range(1, len(order) + 1):
        part = codes[:, order[:k]]
        probe = fitted(part[learnt], y[learnt], even=True)
        f1s.append(_f1(probe(part[heldout]) > 0, y[heldout]))
        if k > 1 and f1s[-1] - f1s[-2] <= JUMP:
            return order[: k - 1].tolist(), f1s[0]
    return order.tolist(), f1s[0]


def _absorption(
    brought: np.ndarray, codes: np.ndarray, cosine: np.ndarray, whole: np.ndarray, latents: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each word whether it is absorbed, and the fraction; `whole` is the projection of its activation on the probe."""
    top = brought.argmax(1)
    largest = brought[np.arange(len(brought)), top]
    silent = ~(codes[:, latents] > 0).any(1)
    full = silent & (cosine[top] >= ALIGNED) & (whole > 0) & (largest >= SHARE * whole)
    main = brought[:, latents].sum(1)
    others = np.where(cosine >= CLEARLY_ALIGNED, brought, 0)
    others[:, latents] = 0
    best = np.sort(others.clip(min=0), axis=1)[:, -MOST_ABSORBING:].sum(1)
    taken = np.minimum(best, whole - main)
    total = np.where(taken + main > 0, taken + main, 1)
    fraction = np.where(main <= 0, 1.0, taken / total).clip(0, 1)
    return full, np.where((whole <= 0) | (main >= whole) | (best < SHARE * whole), 0.0, fraction)


def _f1(said: np.ndarray, y: np.ndarray) -> float:
    both = int((said & y).sum())
    return 2 * both / max(int(said.sum()) + int(y.sum()), 1)
