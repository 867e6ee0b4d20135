"""The model card of a published SAE: what it is, what it was trained on, its figures, and how to load it."""

import dataclasses
import re
from typing import Any

from saelab.autoencoders import serialization
from saelab.autoencoders.sae import SAE
from saelab.base.errors import ConfigError
from saelab.interop.exports import exported, saelens

Z = 1.96  # of a 95% interval
# Figures of a report, in the order of the card: field, what it is called, and the field with its standard error.
_FIGURES = (
    ("l0", "L0: latents that fire on a token", None),
    ("explained_variance", "explained variance", None),
    ("explained_variance_all", "explained variance, of all tokens", None),
    ("delta_ce", "rise of the cross-entropy, nats a token", "delta_ce_se"),
    ("kl", "KL(clean, spliced), nats a token", "kl_se"),
    ("ce_score", "CE score, against zero where it replaces", None),
    ("ce_score_all", "CE score, against zero everywhere", None),
    ("dead_fraction", "share of latents that fired on no token", None),
)
_TRAINED_ON = {
    "corpus": "corpus", "corpus_digest": "digest of the corpus", "model_digest": "digest of the model", "split": "split",
    "context_length": "context length", "prepend_bos": "contexts begin with BOS", "skip_positions": "positions left out",
    "max_norm": "norm limit, in medians", "trained_tokens": "tokens", "seed": "seed",
}  # fmt: skip


def card(sae: SAE, repo: str, folder: str, report: Any = None, license: str | None = None) -> str:
    """The README.md of a repository with this one SAE, in markdown with the hub's header."""
    import yaml

    kind = [] if sae.cfg.centres_input else ["transcoder"]
    about = {
        "library_name": "saelens" if _saelens_reads(sae) else "saelab", "base_model": _hub_model(sae),
        "license": license,
        "tags": ["saelab", "sparse-autoencoder", "mechanistic-interpretability", *kind],
    }  # fmt: skip
    header = yaml.safe_dump({key: value for key, value in about.items() if value}, sort_keys=False)
    return f"---\n{header}---\n\n# {repo.split('/')[-1]}\n\n{section(sae, repo, folder, report)}"


def merged(present: str, sae: SAE, repo: str, folder: str, report: Any = None) -> str:
    """A card that is there already, with the section of this folder put in the place of an older one, or at its end."""
    new = section(sae, repo, folder, report)
    start, end = _marks(folder)
    old = re.compile(re.escape(start) + ".*?" + re.escape(end) + "\n?", re.DOTALL)
    return old.sub(lambda _: new, present, count=1) if old.search(present) else f"{present.rstrip()}\n\n{new}"


def section(sae: SAE, repo: str, folder: str, report: Any = None) -> str:
    """What the card says of one folder."""
    start, end = _marks(folder)
    kind = "sparse autoencoder" if sae.cfg.centres_input else "transcoder"
    site, target, named = sae.metadata.get("site"), sae.metadata.get("target_site"), serialization.model_name(sae)
    model = f"[{named}](https://huggingface.co/{named})" if _hub_model(sae) else f"`{named}`"
    place = f" of `{site}`" if site else ""
    place += f", predicting `{target}`," if target else ""
    place += f" in {model}" if named else ""
    width = f"{sae.d_in:,}" if sae.d_out == sae.d_in else f"{sae.d_in:,} to {sae.d_out:,}"
    lines = [
        start, f"## `{folder}`", "",
        f"A {kind}{place}: `{sae.cfg!r}`, {sae.d_sae:,} latents, width {width}, made with saelab.", "",
        "### Trained on", "", *_trained_on(sae), "", "### Figures", "", *_figures(report), "", "### How to load it", "",
        "```python", "import saelab", f'sae = saelab.load_sae("{repo}", "{folder}")', "```", "",
        *_in_saelens(sae, repo, folder), end, "",
    ]  # fmt: skip
    return "\n".join(lines)


def _hub_model(sae: SAE) -> str | None:
    """The model's name where it is one of the hub, not that of a folder."""
    name = serialization.model_name(sae)
    return name if name and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) else None


def _marks(folder: str) -> tuple[str, str]:
    return f"<!-- saelab: {folder} -->", f"<!-- end of {folder} -->"


def _trained_on(sae: SAE) -> list[str]:
    known = [(name, sae.metadata[key]) for key, name in _TRAINED_ON.items() if sae.metadata.get(key) is not None]
    if not known:
        return ["Not known: it was not trained by saelab, or not from a model."]
    return ["| | |", "| --- | --- |", *(f"| {name} | {_plain(value)} |" for name, value in known)]


def _figures(report: Any) -> list[str]:
    if report is None:
        return ["Not evaluated."]
    if not dataclasses.is_dataclass(report) or isinstance(report, type) or not hasattr(report, "sparsity_tokens"):
        raise ConfigError(f"report is {type(report).__name__}: give what saelab.evaluate(sae, lm, corpus) gives")
    of = dataclasses.asdict(report)
    rows = []
    for key, name, error in _FIGURES:
        value = of[key]
        interval = f"{value - Z * of[error]:.4g} to {value + Z * of[error]:.4g}" if error else ""
        rows.append(f"| {name} | {value:.4g} | {interval} |")
    return [
        "| | | 95% interval |", "| --- | --- | --- |", *rows, "",
        f"At `{of['site']}`, on {of['tokens']:,} tokens of the {of['split']} split ({of['sparsity_tokens']:,} for the last), "
        f"{of['replaced_fraction']:.1%} of them replaced; `saelab.Report` defines each. Intervals are over contexts: too "
        "narrow where those are of few documents.",
    ]  # fmt: skip


def _in_saelens(sae: SAE, repo: str, folder: str) -> list[str]:
    if not _saelens_reads(sae):
        return ["SAELens has no class for it.", ""]
    return [
        "```python", "from sae_lens import SAE", f'sae = SAE.from_pretrained("{repo}", "{folder}")', "```", "",
    ]  # fmt: skip


def _saelens_reads(sae: SAE) -> bool:
    """Whether SAELens reads our folder as it is."""
    try:
        config, _ = saelens(exported(sae))
    except ConfigError:
        return False
    return bool(config["architecture"] == serialization.saelens_config(sae)["architecture"])


def _plain(value: Any) -> str:
    """As a cell of a table: no mark-up, one line."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(text.split()))
