"""`saelab analyze`: analyses of a trained autoencoder, by name; one function here for each."""

from collections.abc import Callable
from typing import Any

import saelab
from saelab.base.errors import ConfigError
from saelab.base.files import write_csv
from saelab.cli.evaluate import known, load
from saelab.cli.options import DEVICE, REQUIRED, Command, Of, Option, natural, near, positive

FAMILIES, COST = (
    "saelab.analysis.attention.families_of_latents:latent_families",
    "saelab.analysis.dark_matter.downstream:downstream_cost",
)
OPTIONS = (
    Option("analysis", str, REQUIRED, "which analysis: dark-matter or attention", positional=True),
    Option("sae", str, REQUIRED, "folder of a run or of a saved SAE", positional=True),
    Option("model", str, None, "the model (default: the one it was trained on)"),
    Option("corpus", str, None, "the corpus (default: the one it was trained on)"),
    Option("site", str, None, "the site (default: the one it was trained on)"),
    Option(
        "tokens",
        positive,
        None,
        "activations to read (dark-matter: 100,000, half held out; attention: 20,000)",
    ),
    Option(
        "split",
        str,
        Of(FAMILIES, "split"),
        "the part of the corpus that is read: heldout, train or all",
    ),
    Option(
        "downstream-tokens",
        positive,
        Of(COST, "tokens"),
        "dark-matter: tokens for the cross-entropies",
    ),
    Option(
        "latents", natural, (), "attention: latents whose strongest firings are shown with their sources", many=True
    ),
    DEVICE,
    Option("csv", str, None, "also write the table to this file", written=True),
)


def run(values: dict[str, Any]) -> int:
    """Run the analysis that is named."""
    if values["analysis"] not in ANALYSES:
        raise ConfigError(f"unknown analysis {values['analysis']!r}; {near(values['analysis'], ANALYSES)}")
    return ANALYSES[values["analysis"]](values)


def _dark_matter(values: dict[str, Any]) -> int:
    """What the SAE misses: linear and nonlinear, without and with high-norm tokens, and what each part costs the model."""
    import pandas

    from saelab.analysis import dark_matter
    from saelab.analysis.dark_matter import pursuit
    from saelab.evaluation.reconstruction import Reconstruction

    sae = load(values["sae"])
    seed = int(sae.metadata.get("seed") or 0)
    lm = saelab.load_model(known(values, sae, "model"), device=values["device"])
    corpus = saelab.load_corpus(known(values, sae, "corpus"), seed=seed)
    site = known(values, sae, "site")
    as_trained: dict[str, Any] = {name: sae.metadata.get(name) for name in ("context_length", "prepend_bos")}
    tokens = values["tokens"] or 100_000
    x = saelab.harvest(lm, corpus, site=site, tokens=tokens, split=values["split"], **as_trained)
    tables = {
        name: dark_matter.decompose(sae, x, high_norm=high) for name, high in (("ordinary", False), ("all", True))
    }
    table = pandas.concat([parts.to_pandas().assign(rows=name) for name, parts in tables.items()]).set_index("rows")
    print(repr(sae))
    print(table.T.to_string())
    some = next(iter(tables["ordinary"].chunks(x))).x[:2048]
    print(f"\nFVU of {len(some):,} tokens at the SAE's own number of latents")
    for name, codes in pursuit.compared(sae, some).items():
        seen = Reconstruction(sae.d_in)
        seen.add(some, sae.decode(codes).detach())
        print(f"  {name:22} {seen.fvu:.4f}  (L0 {codes.l0:.2f})")
    print("\nR2 of the error's squared norm, from less than the activation")
    print(dark_matter.norm_baselines(tables["ordinary"], x).round(4).to_string())
    print("\nCross-entropy with each part restored, on documents that the map was not fitted on")
    unseen = dark_matter.unseen_documents(tables["ordinary"], corpus)
    cost = dark_matter.downstream_cost(
        tables["ordinary"], lm, unseen, site=site, tokens=values["downstream_tokens"], split="all"
    )
    print(cost.round(4).to_string())
    if values["csv"]:
        write_csv(values["csv"], table, index=True)
    return 0


def _attention(values: dict[str, Any]) -> int:
    """Heads and families of an attention layer's latents, and the sources of some of them."""
    from saelab.analysis import attention

    sae = load(values["sae"])
    sae.metadata["site"] = known(values, sae, "site")
    shares = attention.head_attribution(sae)  # before anything is loaded: it says whether this is an attention SAE
    lm = saelab.load_model(known(values, sae, "model"), device=values["device"])
    corpus = saelab.load_corpus(known(values, sae, "corpus"), seed=int(sae.metadata.get("seed") or 0))
    tokens = values["tokens"] or Of(FAMILIES, "tokens").value
    families = attention.latent_families(sae, lm, corpus, tokens=tokens, split=values["split"])
    mine = shares[families.table.index.to_list()].cpu()
    table = families.table.assign(head=mine.argmax(1).numpy(), head_share=mine.amax(1).numpy())
    print(repr(sae))
    print(f"\n{families!r}")
    print("\nLatents by the head with the largest share of their decoder, and by family")
    print(table.groupby(["head", "family"]).size().unstack(fill_value=0).to_string())
    print("\nThe three most used latents of each family")
    columns = ["family", "firings", "head", "head_share", "top_token", "top_token_share"]
    most = table.sort_values("firings", ascending=False).groupby("family").head(3).sort_values("family", kind="stable")
    most = most.assign(top_token=[lm.token_text(token) for token in most.top_token])
    print(most[[*columns, "induction", "previous_token", "local", "long_range"]].round(3).to_string())
    for latent in values["latents"]:
        print(f"\nLatent {latent}")
        examples = families.examples(latent)
        print(examples.round(3).to_string(index=False) if len(examples) else "fires on none of the text read")
    if values["csv"]:
        write_csv(values["csv"], table, index=True)
    return 0


ANALYSES: dict[str, Callable[[dict[str, Any]], int]] = {"dark-matter": _dark_matter, "attention": _attention}

COMMAND = Command(
    name="analyze",
    summary="Analyse a trained autoencoder: what it misses (dark-matter), heads and sources of its latents (attention).",
    examples=(
        "saelab analyze dark-matter runs/demo",
        "saelab analyze dark-matter my-sae --tokens 100_000 --split train --csv parts.csv",
        "saelab analyze attention runs/blocks.17.attn.hook_z --latents 7 123",
    ),
    options=OPTIONS,
    run=run,
)
