"""A made-up dashboard of any size, with hostile strings in every place that shows text: for tests and benchmarks."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from saelab.dashboards.writing.codec import Column, Half, cut, encode, none_of, texts

HOSTILE = [
    "</script><script>window.__pwned=1</script>",
    '<img/src="x"/onerror="window.__pwned=1">',
    "<!--<script>",
    "<!--",
    "<script",
    "<img",
    "</",
    '"><!--',
    "\u2028\u2029\x00",
    "\x1b[31mred\x1b[0m",
    "\u202eevil\u2066x\u2069",
    "Z" + "\u0301\u0316\u0335" * 12,
    "\u200b\u200d",
    "__proto__",
    "constructor",
    "|",
    "=HYPERLINK(\"javascript:window.__pwned=1\")",
    "@SUM(A1:A9)",
    "[x](javascript:window.__pwned=1)",
    "{{constructor.constructor('window.__pwned=1')()}}",
    "&lt;b&gt;&amp;#8203;&mdash;",
    "../../etc/passwd",
    "CON",
    "x" * 300,
]  # fmt: skip
SPLIT = ["😀".encode(), "привет".encode(), "日本".encode()]  # cut into single bytes below
LONG = "L" * 100_000

GROUPS: list[dict[str, Any]] = [
    {"name": "Top", "kind": "top", "lo": None, "hi": None},
    *({"name": f"{20 * i} to {20 * i + 20}% of the maximum", "kind": "interval", "lo": i / 5, "hi": (i + 1) / 5}
      for i in range(4, -1, -1)),
    *({"name": f"Quantile {20 * i} to {20 * i + 20}%", "kind": "quantile", "lo": i / 5, "hi": (i + 1) / 5}
      for i in range(4, -1, -1)),
    {"name": "Random", "kind": "random", "lo": None, "hi": None},
    {"name": "Near misses", "kind": "near", "lo": None, "hi": None},
]  # fmt: skip
SIZES = [15, *[2] * 5, *[2] * 5, 5, 5]


def tokens(n: int = 2_000, long_token: bool = False) -> list[bytes]:
    """Token bytes: the hostile ones, characters split over tokens, invalid UTF-8, then made-up words."""
    rng = np.random.default_rng(0)
    found = [text.encode() for text in HOSTILE] + [bytes([b]) for text in SPLIT for b in text]
    found += [b"\n", b"\t", b"\r\n", b" ", b"", b"\xff", b"\xc3", " naïve".encode(), "مرحبا".encode(), b"\xed\xa0\x80"]
    found += [LONG.encode()] if long_token else []
    while len(found) < n:
        word = "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, 9)))
        found.append((" " * (rng.random() < 0.7) + word).encode())
    return found[:n]


def chunks(
    d_sae: int = 256,
    pages: int | None = None,
    *,
    windows: bool = True,
    heads: int | None = None,
    effects: bool = True,
    compare: bool = False,
    prompts: int = 2,
    labels: float = 0.5,
    extras: bool = True,
    vocab: int = 2_000,
    long_token: bool = False,
    per_chunk: int = 64,
    seed: int = 0,
) -> Iterator[tuple[str, bytes]]:
    """(name, container) of every chunk but the manifest, which `manifest` makes; deterministic.

    `pages` latents (all by default), spread evenly, have a page; latent 0 is dead, 1 fires on every token, 2 exactly
    once. `extras`: seeds, null and sweeps. `windows=False` leaves windows out, for indexes of a million.
    """
    rng = np.random.default_rng(seed)
    words = tokens(vocab, long_token)
    yield "vocab", _vocab(words, rng)
    for prefix in ("", "b-") if compare else ("",):
        counts = _counts(d_sae, rng)
        paged = np.unique(np.linspace(0, d_sae - 1, min(pages or d_sae, d_sae)).astype("<u4"))
        yield from _index(prefix, d_sae, counts, paged, len(words), compare, extras, rng)
        if labels:
            yield prefix + "lab", _labels(d_sae, labels, rng)
        yield prefix + "inv", _inverted(len(words), len(paged), rng)
        if extras:
            yield prefix + "steer", _steer(paged)
        for i in range(0, len(paged), per_chunk):
            latents = paged[i : i + per_chunk]
            made = _page(latents, counts, d_sae, len(words), windows, heads, effects, extras, rng)
            yield f"{prefix}f-{i // per_chunk:05d}", encode("features", made)
            miss = rng.integers(0, 16, made["pool"].size if windows else 0).astype("u1")  # type: ignore[union-attr]
            yield f"{prefix}m-{i // per_chunk:05d}", encode("miss", {"miss": miss})
    for i in range(prompts):
        yield f"p-{i:03d}", _prompt(len(words), d_sae, effects, rng)


def manifest(**arguments: Any) -> dict[str, Any]:
    """The manifest, without "chunks", that belongs to `chunks(**arguments)`."""
    d_sae = arguments.get("d_sae", 256)
    pages = min(arguments.get("pages") or d_sae, d_sae)
    extras, compare = arguments.get("extras", True), arguments.get("compare", False)
    saes = [
        {
            "prefix": prefix, "name": name, "digest": "0" * 64, "architecture": "TopK", "config": {"k": 32, "d_sae": d_sae},
            "site": "blocks.3.hook_z" if arguments.get("heads") else "blocks.3.hook_resid_post", "kind": "residual",
            "d_in": 576, "d_sae": d_sae, "pages": pages, "per_chunk": arguments.get("per_chunk", 64),
            "heads": arguments.get("heads"), "firings": 6_400_000, "l0": 32.0, "explained_variance": 0.81, "dead": 1,
            "silent": 1,            "dense": 1, "duplicates": max(d_sae // 50, 1),
            "evaluation": {"l0": 31.9, "explained_variance": 0.803, "ce_clean": 3.31, "ce_sae": 3.52, "ce_score": 0.97,
                           "kl": 0.21, "tokens": 8192.0, "dead_fraction": None, "selection": "plain"},
            "effects": {"mode": "first-order", "rank_correlation": 0.93, "n": 3 * pages, "contexts": 3}
            if arguments.get("effects", True) else None,
            "seeds": {"others": 3, "threshold": 0.9} if extras else None,
            "null": {"name": "re-initialised model", "l0": 30.0} if extras else None,
            "matches": ("b-" if not prefix else "") if compare else None,
        }
        for prefix, name in ((("", HOSTILE[0]), ("b-", "B " + HOSTILE[1])) if compare else (("", HOSTILE[0]),))
    ]  # fmt: skip
    prompts = [
        {"chunk": f"p-{i:03d}", "text": "The state " + HOSTILE[i % len(HOSTILE)], "tokens": 24, "prefix": ""}
        for i in range(arguments.get("prompts", 2))
    ]
    return {
        "format": "saelab-dashboard", "version": 1, "title": "Synthetic " + HOSTILE[0],
        "versions": {"saelab": "0", "torch": "0"},
        "model": {"name": "model " + HOSTILE[1], "digest": "1" * 64, "d_vocab": 49_152},
        "corpus": {"name": HOSTILE[2], "digest": "2" * 64, "split": "train", "seed": 0, "contexts": 782,
                   "context_length": 256, "tokens": 200_192, "counted": 199_410, "skip_positions": 1, "norm_limit": 88.5},
        "settings": {"tokens": 200_000, "windows": 45, "window": 48}, "saes": saes, "groups": GROUPS, "prompts": prompts,
        "coactivation": {"contexts": 782},
    }  # fmt: skip


def _token_type(n: int) -> np.dtype:
    return np.dtype("<u2" if n < 65_535 else "<u4")


def _counts(n: int, rng: np.random.Generator) -> np.ndarray:
    counts = np.minimum(np.exp(rng.normal(5, 2, n)), 150_000).astype("<u4") + 3
    counts[:3] = [0, 199_410, 1][: min(3, n)]
    return counts


def _vocab(words: list[bytes], rng: np.random.Generator) -> bytes:
    flags = np.array([2 * (not _is_text(word)) for word in words], "u1")
    flags[-1] |= 1
    return encode("vocab", {
        "id": np.cumsum(rng.integers(1, 20, len(words))).astype("<u4"),
        "length": np.array([len(word) for word in words], "<u4"),
        "bytes": np.frombuffer(b"".join(words), "u1"),
        "flags": flags,
        "count": rng.integers(1, 9_999, len(words)).astype("<u4"),
    })  # fmt: skip


def _is_text(word: bytes) -> bool:
    try:
        word.decode()
    except UnicodeDecodeError:
        return False
    return True


def _index(prefix: str, n: int, counts: np.ndarray, paged: np.ndarray, n_words: int, compare: bool, extras: bool,
           rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:  # fmt: skip
    dtype = _token_type(n_words)
    peak = np.where(counts > 0, np.exp(rng.normal(1, 1, n)), 0.0)
    flags = np.zeros(n, "u1")
    flags[paged] |= 1
    flags[counts == 0] |= 2 + 16
    flags[counts > 19_941] |= 4
    flags[:: 50] |= 8  # fmt: skip
    tops = np.where(counts[:, None] > np.arange(3), rng.integers(0, n_words, (n, 3)), none_of(dtype)).astype(dtype)
    yield prefix + "idx-0", encode("index", {
        "count": counts, "max": Half(peak), "mean": Half(peak * 0.4), "flags": flags,
        "focus": np.where(counts > 0, np.random.default_rng(n).random(n), 0).astype("<f2"),
        "tok0": tops[:, 0], "tok1": tops[:, 1], "tok2": tops[:, 2],
    })  # fmt: skip
    columns: dict[str, Column] = {
        "dec_norm": Half(rng.uniform(0.9, 1.1, n)), "enc_dec": rng.uniform(0.2, 1, n).astype("<f2"),
        "near": rng.integers(0, n, n).astype("<u4"), "near_cos": rng.uniform(0.1, 1, n).astype("<f2"),
        "contexts": np.minimum(counts, 782).astype("<u4"),
    }  # fmt: skip
    if compare:
        columns |= {"match": rng.integers(0, n, n).astype("<u4"), "match_cos": rng.uniform(0, 1, n).astype("<f2")}
    if extras:
        columns |= {
            "seeds": rng.integers(0, 4, n).astype("u1"),
            "null_count": rng.permutation(counts),
            "null_max": Half(peak),
        }
    yield prefix + "idx-1", encode("index", columns)
    yield prefix + "pages", encode("pages", {"latent": paged})
    lying = np.random.default_rng(len(paged)).uniform(-1, 1, (4, len(paged))).astype("<f2")
    yield (
        prefix + "map",
        encode("map", dict(zip(("pca_x", "pca_y", "neighbours_x", "neighbours_y"), lying, strict=True))),
    )


def _labels(n: int, share: float, rng: np.random.Generator) -> bytes:
    latents = np.flatnonzero(rng.random(n) < share).astype("<u4")
    names = ["words about trade", "years after 1900", "the start of a list", "naïve café — 日本"]
    strings = [HOSTILE[i % len(HOSTILE)] if i % 7 == 3 else f"{names[i % 4]} {i}" for i in latents.tolist()]
    source = (latents % 2).astype("u1")
    score = np.where(latents % 3 == 0, np.nan, 0.5).astype("<f2")
    columns = {"latent": latents, **texts(strings), "source": source, "score": score}
    return encode("labels", columns, sources=["someone", HOSTILE[0]])


def _inverted(n_words: int, n_pages: int, rng: np.random.Generator) -> bytes:
    columns: dict[str, Column] = {}
    for name in ("acts", "logits"):
        n = np.minimum(rng.integers(0, 8, n_words), n_pages).astype("<u2")
        columns[name + "_n"] = n
        found = [np.sort(rng.integers(0, n_pages, k)) for k in n]
        columns[name] = np.concatenate(found).astype("<u4")
    return encode("inverted", columns)


def _steer(paged: np.ndarray) -> bytes:
    import json

    rows = [
        json.dumps({"operation": "add", "strength": s, "unit": "max_activation", "prompt": "The state " + HOSTILE[int(f) % 20],
                    "seed": 0, "text": HOSTILE[int(f + s) % 20] * 3, "baseline": "of the union", "kl": 0.1 * s})
        for f in paged[:8] for s in (1, 2, 4)
    ]  # fmt: skip
    latents = paged[:8]
    return encode("steer", {"latent": latents, "rows": np.full(len(latents), 3, "<u4"), **texts(rows)})


def _page(latents: np.ndarray, counts: np.ndarray, d_sae: int, n_words: int, windows: bool, heads: int | None,
          effects: bool, extras: bool, rng: np.random.Generator) -> dict[str, Column]:  # fmt: skip
    n, dtype = len(latents), _token_type(n_words)
    f4 = lambda low, high, *shape: np.asarray(rng.uniform(low, high, shape or (n,))).astype("<f4")  # noqa: E731
    f2 = lambda low, high, *shape: np.asarray(rng.uniform(low, high, shape)).astype("<f2")  # noqa: E731
    word = lambda *shape: rng.integers(0, n_words, shape).astype(dtype)  # noqa: E731
    other = lambda: rng.integers(0, d_sae, (n, 10)).astype("<u4")  # noqa: E731
    count = counts[latents]
    bins = np.where(count > 0, rng.integers(1, 40, n), 0).astype("<u2")
    peak = np.where(count > 0, f4(1, 20), 0).astype("<f4")
    columns: dict[str, Column] = {
        "latent": latents, "windows": np.zeros(n, "<u2"), "count": count, "contexts": np.minimum(count, 782).astype("<u4"),
        "max": peak, "min": peak / 100, "mean": peak / 3, "std": peak / 5, "skew": f4(-1, 3),
        "kurtosis": f4(-1, 9), "square": f4(0, 1),
        "hist_first": rng.integers(-20, 0, n).astype("<i2"), "hist_bins": bins,
        "hist": rng.integers(0, 999, int(bins.sum())).astype("<u4"),
    }  # fmt: skip
    if extras:
        columns |= {"null_first": np.full(n, -20, "<i2"), "null_bins": np.full(n, 9, "<u2"),
                    "null_hist": rng.integers(0, 99, 9 * n).astype("<u4")}  # fmt: skip
    tok = np.where(np.arange(10) < np.minimum(count, 10)[:, None], word(n, 10), none_of(dtype)).astype(dtype)
    columns |= {"tok_n": count, "tok": tok, "tok_count": np.sort(rng.integers(1, 7, (n, 10)))[:, ::-1].astype("<u4"),
                "tok_mean": Half(f4(0, 9, n, 10))}  # fmt: skip
    for prefix in ("", "raw_"):
        columns |= {prefix + "top": word(n, 10), prefix + "top_value": np.sort(f2(0.5, 3, n, 10))[:, ::-1],
                    prefix + "bottom": word(n, 10), prefix + "bottom_value": np.sort(f2(-3, -0.5, n, 10))}  # fmt: skip
    columns |= {"logit_lo": f4(-3, -2), "logit_hi": f4(2, 3), "logit_hist": rng.integers(0, 3_000, (n, 40)).astype("<u4"),
                "dec_norm": f4(0.9, 1.1), "enc_norm": f4(0.9, 3), "enc_dec": f4(0.2, 1), "b_enc": f4(-1, 1)}  # fmt: skip
    for kind in ("dec", "enc"):
        columns |= {kind + "_near": other(), kind + "_cos": np.sort(f2(0, 1, n, 10))[:, ::-1]}
    columns |= _together(columns["contexts"], other(), rng)  # type: ignore[arg-type]
    if heads:
        shares = rng.dirichlet(np.ones(heads), n)
        columns["heads"] = shares.astype("<f2")
    columns["scale"] = peak
    columns |= _windows(latents, count, peak, n_words, windows, heads, effects, rng)
    return columns


def _together(contexts: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> dict[str, Column]:
    """Latents that fire in the same contexts: none for a latent without any, never more than it has."""
    both = np.minimum(rng.integers(1, 99, other.shape), contexts[:, None])
    before = rng.integers(0, both + 1)
    return {
        "coact": np.where(both > 0, other, none_of(other.dtype)).astype("<u4"), "coact_both": both.astype("<u4"),
        "coact_contexts": np.minimum(both + rng.integers(0, 600, other.shape), 782).astype("<u4"),
        "coact_before": before.astype("<u4"), "coact_after": rng.integers(0, both - before + 1).astype("<u4"),
        "coact_lag": np.where(both > 0, rng.normal(0, 20, other.shape), np.nan).astype("<f2"),
    }  # fmt: skip


def _windows(latents: np.ndarray, count: np.ndarray, peak: np.ndarray, n_words: int, windows: bool, heads: int | None,
             effects: bool, rng: np.random.Generator) -> dict[str, Column]:  # fmt: skip
    n, dtype = len(latents), _token_type(n_words)
    groups = np.repeat(np.arange(len(GROUPS)), SIZES)
    firing = groups < 11  # random and near-miss windows need no firing
    number = np.array([(firing[:c].sum() if c < 35 else 35) + 10 for c in count]) if windows else np.zeros(n, int)
    w = int(number.sum())
    of = np.repeat(np.arange(n), number)
    group = np.concatenate([np.r_[groups[: k - 10], groups[35:]] for k in number] or [groups[:0]]) if w else groups[:0]
    length = rng.integers(30, 49, w)
    place = rng.integers(0, length) if w else length
    pool = rng.integers(0, n_words, max(4_000, 60) if w else 0).astype(dtype)
    total, start = int(length.sum()), np.cumsum(length) - length
    acts = np.where(rng.random(total) < 0.05, rng.integers(1, 256, total), 0).astype("u1")
    acts[(start + place)[group == 0]] = 255
    out: dict[str, Column] = {
        "windows": number.astype("<u2"), "group": group.astype("u1"), "context": rng.integers(0, 782, w).astype("<u4"),
        "document": rng.integers(0, 230, w).astype("<u4"), "start": rng.integers(1, 200, w).astype("<u2"),
        "peak": place.astype("u1"),
        "offset": rng.integers(0, 4_000 - 48, w).astype("<u4"), "length": length.astype("u1"),
        "act": (peak[of] * rng.uniform(0.1, 1, w)).astype("<f4"), "repeat": (rng.random(w) < 0.05).astype("u1"),
        "acts": acts, "pool": pool,
    }  # fmt: skip
    if effects:
        chosen = np.flatnonzero(rng.random(w) < 0.1).astype("<u4")
        x = len(chosen)
        out |= {
            "effect_scale": rng.uniform(0.1, 2, n).astype("<f4"),
            "effects": np.where(acts > 0, rng.integers(-127, 128, total), 0).astype("i1"),
            "x_window": chosen, "x_method": rng.integers(1, 3, x).astype("u1"), "x_loss": rng.normal(0, 1, x).astype("<f4"),
            "x_kl": rng.uniform(0, 1, x).astype("<f4"), "x_next": rng.integers(0, n_words, x).astype(dtype),
            "x_p": rng.random(x).astype("<f2"), "x_p_ablated": rng.random(x).astype("<f2"),
            "x_up": rng.integers(0, n_words, (x, 3)).astype(dtype), "x_up_delta": rng.uniform(0, 0.3, (x, 3)).astype("<f2"),
            "x_down": rng.integers(0, n_words, (x, 3)).astype(dtype),
            "x_down_delta": rng.uniform(-0.3, 0, (x, 3)).astype("<f2"),
        }  # fmt: skip
    if heads:
        # Distinct places, some before the window.
        back = [rng.choice(at + 5, min(at + 5, 6), replace=False) for at in place.tolist()]
        m = sum(map(len, back))
        out |= {"dfa_n": np.array([len(b) for b in back], "u1"), "dfa_back": np.concatenate(back).astype("<u2"),
                "dfa_head": rng.integers(0, heads, m).astype("u1"), "dfa": Half(rng.normal(0, 1, m))}  # fmt: skip
    return out


def _prompt(n_words: int, d_sae: int, effects: bool, rng: np.random.Generator) -> bytes:
    n = rng.integers(5, 33, 24).astype("<u2")
    total = int(n.sum())
    logprob = rng.uniform(-9, 0, 24).astype("<f2")
    logprob[0] = np.nan
    columns: dict[str, Column] = {
        "token": rng.integers(0, n_words, 24).astype(_token_type(n_words)), "logprob": logprob,
        "miss": rng.integers(0, 16, 24).astype("u1"),
        "n": n, "latent": rng.integers(0, d_sae, total).astype("<u4"), "act": rng.uniform(0, 9, total).astype("<f4"),
        "quantile": rng.random(total).astype("<f2"),
    }  # fmt: skip
    if effects:
        columns["effect"] = Half(rng.normal(0, 0.1, total))
    return encode("prompt", columns)


__all__ = ["GROUPS", "HOSTILE", "chunks", "cut", "manifest", "tokens"]
