"""`saelab analyze`: analyses of a trained autoencoder, one command each."""

from collections.abc import Sequence
from typing import Any

import saelab
from saelab.analysis import attention as heads
from saelab.analysis import dark_matter as parts_of_errors
from saelab.analysis import denoisers
from saelab.analysis.dark_matter import pursuit
from saelab.base.files import user_path, write_csv
from saelab.cli.commands import command, group, of
from saelab.cli.inputs import known, trained
from saelab.cli.values import File
from saelab.evaluation.reconstruction import Reconstruction

TITLES = {
    "spectrum": "The Jacobian of the denoised image, along two runs",
    "dynamics": "Change of features from a step to the next",
    "reuse": "Error of the predicted noise where features are those of some steps before",
    "schedule": "Steps for which features may be reused, by site and timestep",
    "gap": "What noise takes away of images",
    "probes": "Accuracy of linear probes for the class",
}
DEVICE = of(saelab.load_denoiser, "device")
SPLIT, DOWNSTREAM = (of(parts_of_errors.downstream_cost, name) for name in ("split", "tokens"))


@command(opening=trained)
def dark_matter(
    sae: Any, lm: Any, corpus: Any, /, *, site: str | None = None, tokens: int = 100_000, split: Any = SPLIT,
    downstream_tokens: Any = DOWNSTREAM, csv: File | None = None,
) -> int:  # fmt: skip
    """What the SAE misses: linear and nonlinear, without and with high-norm tokens, and what each part costs the model.

    Args:
        site: the site (default: the one it was trained on)
        tokens: activations to read, half of them held out
        csv: also write the table to this file

    Examples:
        saelab analyze dark-matter runs/demo
        saelab analyze dark-matter my-sae --tokens 100_000 --split train --csv parts.csv
    """
    import pandas

    site = known(sae, "site", site)
    as_trained: dict[str, Any] = {name: sae.metadata.get(name) for name in ("context_length", "prepend_bos")}
    x = saelab.harvest(lm, corpus, site=site, tokens=tokens, split=split, **as_trained)
    tables = {
        name: parts_of_errors.decompose(sae, x, high_norm=high) for name, high in (("ordinary", False), ("all", True))
    }
    ordinary = tables["ordinary"]
    table = pandas.concat([parts.to_pandas().assign(rows=name) for name, parts in tables.items()]).set_index("rows")
    print(repr(sae))
    print(table.T.to_string())
    some = next(iter(ordinary.chunks(x))).x[:2048]
    print(f"\nFVU of {len(some):,} tokens at the SAE's own number of latents")
    for name, codes in pursuit.compared(sae, some).items():
        seen = Reconstruction(sae.d_in)
        seen.add(some, sae.decode(codes, some).detach())
        print(f"  {name:22} {seen.fvu:.4f}  (L0 {codes.l0:.2f})")
    print("\nR2 of the error's squared norm, from less than the activation")
    print(parts_of_errors.norm_baselines(ordinary, x).round(4).to_string())
    print("\nCross-entropy with each part restored, on documents that the map was not fitted on")
    unseen = parts_of_errors.unseen_documents(ordinary, corpus)
    cost = parts_of_errors.downstream_cost(ordinary, lm, unseen, site=site, tokens=downstream_tokens, split="all")
    print(cost.round(4).to_string())
    if csv:
        write_csv(csv, table, index=True)
    return 0


@command(heads.latent_families, opening=trained)
def attention(
    sae: Any, lm: Any, corpus: Any, /, *, site: str | None = None, latents: Sequence[int] = (),
    csv: File | None = None, **how: Any,
) -> int:  # fmt: skip
    """Heads and families of an attention layer's latents, and the sources of some of them.

    Args:
        site: the site (default: the one it was trained on)
        latents: latents whose strongest firings are shown with their sources
        csv: also write the table to this file

    Examples:
        saelab analyze attention runs/blocks.17.attn.hook_z --latents 7 123
    """
    sae.metadata["site"] = known(sae, "site", site)
    shares = heads.head_attribution(sae)
    families = heads.latent_families(sae, lm, corpus, **how)
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
    for latent in latents:
        print(f"\nLatent {latent}")
        examples = families.examples(latent)
        print(examples.round(3).to_string(index=False) if len(examples) else "fires on none of the text read")
    if csv:
        write_csv(csv, table, index=True)
    return 0


@command(denoisers.overview_of, without="denoiser images labels")
def denoiser(name: str = "digits-unet", *, device: Any = DEVICE, csv: str | None = None, **how: Any) -> int:
    """A denoiser from inside: rank of its Jacobian, change and reuse of features, what is left of the image, linear probes.

    Args:
        name: digits-unet, mnist-unet, a folder or a name on the hub
        csv: also write each table to this folder

    Examples:
        saelab analyze denoiser digits-unet --sites mid_block up_blocks.0
        saelab analyze denoiser mnist-unet --steps 10 --csv tables
    """
    loaded = saelab.load_denoiser(name, device=device)
    found = denoisers.overview_of(loaded, **how)
    print(repr(loaded))
    for part, table in found.tables.items():
        print(f"\n{TITLES[part]}")
        print(table.round(3).to_string(index=False))
        if csv:
            folder = user_path(csv)
            folder.mkdir(parents=True, exist_ok=True)
            write_csv(folder / f"{part}.csv", table)
    return 0


analyze = group("analyze", dark_matter, attention, denoiser)
