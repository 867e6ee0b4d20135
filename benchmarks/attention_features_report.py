"""results/attention_features.md from the files that attention_features.py left."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import workers

from saelab.analysis.attention.families_of_latents import (
    FAMILIES,
    FAR,
    FIRINGS,
    MOST,
    NEAR,
    OVER_CHANCE,
    PERSISTENT,
    SPREAD,
)
from saelab.base.files import whole_file

BLOCKS = (2, 16, 17, 18)


def write(folder: Path, size: dict[str, Any], out: Path) -> None:
    """Write the report of the steps that are there."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    families = {b: found[f"families-{b}"] for b in BLOCKS if f"families-{b}" in found}
    parts = ["# Attention-output features of SmolLM2", workers.machine(torch.get_num_threads()), setting(size)]
    made = (
        ("heads", heads), ("prefixes", prefixes), ("agreement", agreement), ("ioi", noising), ("effects", effects),
        ("ioi-latents", ablations), ("ioi-order", order), ("circuit", circuit),
    )  # fmt: skip
    sections = {name: make(found[name]) for name, make in made if found.get(name)}
    ordered = [sections.pop(name) for name in ("heads", "prefixes", "agreement") if name in sections]
    if families:
        ordered += [family_counts(families), shown(families), proxies(families)]
    parts += [*ordered, *sections.values()]
    with whole_file(out) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")
    print(f"written: {out}")


def table(rows: Any) -> str:
    """Markdown of records or of a data frame."""
    frame = pd.DataFrame(rows)
    cells = frame.map(lambda v: f"{v:.3g}" if isinstance(v, float) else str(v).replace("|", "\\|").replace("\n", "⏎"))
    return workers.table(list(map(str, frame.columns)), cells.values.tolist())


def setting(size: dict[str, Any]) -> str:
    return (
        f"SAEs: TopK of {size['d_sae']:,} latents on `hook_z` at k 16 and 32, of {size['d_residual']:,} at k 32 on the "
        f'residual stream; {size["tokens"]:,} distinct tokens of the train split of "sotu", {size["training"]:,} read (small, '
        f"briefly trained: shares and counts are of such SAEs). Families are of k 16, on {size['read']:,} tokens of held-out "
        f"documents; agreement of heads on {size['heldout']:,} held-out rows. Seed 0; sites, sizes and rules were fixed "
        f"beforehand.\n\nRules of families (ours), on shares of the positive attribution to source positions, averaged over a "
        f"latent's firings weighed by activation, the first that holds: induction, duplicate token (at least {MOST:g} and "
        f"{OVER_CHANCE:g} times the share with the tokens in another order), previous token, current token, first position "
        f"(at least {MOST:g}); high-level context (at least {SPREAD:g} effective sources, and {PERSISTENT:g} of the firings "
        f"followed by another at the next position); local (at least {MOST:g} at most {NEAR} back) and long-range context "
        f"(further than {FAR}). Latents with fewer than {FIRINGS} firings are not tested."
    )


def heads(rows: Any) -> str:
    frame = pd.DataFrame(rows)
    parts = ["## Heads\n\nOn random tokens that repeat (8 texts of twice 50 tokens), all 270 heads."]
    best = {
        name: [f"{r.block}.{r.head} ({getattr(r, name):.2f})" for r in frame.nlargest(6, name).itertuples()]
        for name in ("induction", "previous_token", "duplicate")
    }
    parts.append(
        table([{"score": name, **{str(i + 1): cell for i, cell in enumerate(row)}} for name, row in best.items()])
    )
    over = {name: int((frame[name] > 0.5).sum()) for name in best}
    parts.append("Heads above .5: " + ", ".join(f"{name} {count}" for name, count in over.items()) + ".")
    return "\n\n".join(parts)


def prefixes(figures: Any) -> str:
    frame = pd.DataFrame(figures["random"])
    frame["head"] = frame.block.astype(str) + "." + frame["head"].astype(str)
    parts = ["## Long prefixes\n\nAttention to the token after an earlier copy of the last p tokens (standard error), and "
             "what the head writes there to that token's logit, by p; random tokens."]  # fmt: skip
    for name in ("score", "dla"):
        cells = frame.assign(cell=[f"{a:.2f} ({b:.2f})" for a, b in zip(frame[name], frame[f"{name}_se"], strict=True)])
        parts.append(f"`{name}`\n\n" + table(cells.pivot(index="head", columns="prefix", values="cell").reset_index()))
    rows = []
    for head, natural in figures["natural"].items():
        if isinstance(natural, str):
            parts.append(natural)
            continue
        own = pd.DataFrame(natural)
        long = own[own.prefix >= 2]
        rows.append({
            "head": head, "texts with a pair": len(own), "prefix 0": int((own.prefix == 0).sum()),
            "prefix 1": int((own.prefix == 1).sum()), "prefix 2 and more": len(long),
            "attention there": long.attention.mean(), "with the prefix broken": long.attention_broken.mean(),
        })  # fmt: skip
    parts.append("In real text, the first pair above .3 of each context:\n\n" + table(rows))
    return "\n\n".join(parts)


def agreement(rows: Any) -> str:
    frame = pd.DataFrame(rows)
    frame["twice the null"] = 2 * frame.null
    frame["clears both bars"] = (frame.agreement > frame.null_99) & (frame.agreement > frame["twice the null"])
    names = [
        "block",
        "k",
        "dictionary",
        "latents",
        "agreement",
        "null",
        "null_99",
        "twice the null",
        "clears both bars",
    ]
    own = frame[frame.dictionary == "trained"]
    return (
        "## Top head by weights, top head by attribution\n\n`agreement`: of the latents that fire on held-out rows, the share "
        "whose largest share of the decoder's norm and largest mean attribution over firings are in one head. `null`: latents "
        "of one side shuffled (10,000 times), its mean and 99th percentile. `untrained`: random directions, tied encoder, the "
        f"trained one's bias.\n\n{table(frame[names])}\n\n{int(own['clears both bars'].sum())} of {len(own)} trained "
        "dictionaries clear the null's 99th percentile and twice the null's mean. Read it beside the untrained ones: where "
        "these come near, agreement is geometry rather than something learnt."
    )


def family_counts(families: dict[int, Any]) -> str:
    rows = []
    for block, found in families.items():
        for name in ("real", "shuffled", "untrained"):
            own = found[name]
            chance = {f"{m} by chance": f"{share:.3f}" for m, share in own["chance"].items()}
            rows.append({"block": block, "case": name, "live": own["live"], "tested": own["tested"],
                         **{f: own["counts"][f] for f in FAMILIES[:-1]}, **chance})  # fmt: skip
    kept = []
    for block, found in families.items():
        real, shuffled = found["real"]["labels"], found["shuffled"]["labels"]
        for family in ("induction", "previous token"):
            mine = [latent for latent, label in real.items() if label == family]
            fp = [latent for latent, label in shuffled.items() if label == family]
            untrained = list(found["untrained"]["labels"].values())
            kept.append({
                "block": block, "family": family, "real text": len(mine), "share": len(mine) / len(real),
                "untrained share": untrained.count(family) / len(untrained), "shuffled share": len(fp) / len(shuffled),
                "of the real ones again on shuffled text": sum(shuffled.get(latent) == family for latent in mine),
            })  # fmt: skip
    return (
        "## Families\n\n`shuffled`: each text's tokens in random order before the model reads them. `by chance`: the share of "
        "latents tested that would be in the family if the tokens were shuffled in the matching only: the false positives of "
        f"the rule itself.\n\n{table(rows)}\n\nShares of the latents tested:\n\n{table(kept)}\n\n"
        "Shuffled text is no empty control: copies of tokens are still there, and an induction head finds them; attention to "
        "the position before needs no content at all. What a family owes to the layer's heads rather than to the SAE, the "
        "untrained dictionary shows: compare the shares."
    )


def shown(families: dict[int, Any]) -> str:
    parts = ["## Induction and previous-token latents with their sources\n\nThe three of each block with the largest share of "
             "their family, two strongest firings each: text up to the firing, the source token that gave most (with the token "
             "before it) and its share of the positive attribution."]  # fmt: skip
    for family in ("induction", "previous token"):
        rows = []
        for block, found in families.items():
            for latent in found["examples"][family]:
                for e in latent["examples"][:2]:
                    rows.append({
                        "latent": f"{block}/{latent['latent']}", "firings": latent["firings"], "share": latent["share"],
                        "activation": e["activation"], "text": f"…{e['text']}",
                        "source": f"{e['before_source']}[{e['source_token']}]", "back": e["destination"] - e["source"],
                        "of the mass": e["share"],
                    })  # fmt: skip
        parts.append(f"### {family}\n\n{table(rows) if rows else 'none'}")
    return "\n\n".join(parts)


def proxies(families: dict[int, Any]) -> str:
    rows = [
        {"latent": f"{block}/{row['latent']}", **row} for block, found in families.items() for row in found["proxies"]
    ]
    text = "## Token-induction proxies\n\nInduction latents with one strongest source token in at least half of the firings; "
    if not rows:
        return text + "there is none."
    frame = pd.DataFrame(rows)
    return text + (
        "the proxy: the current token was seen before and that token came after it. Latents and tokens were chosen on "
        "the texts that the figures are of, which flatters them. `specificity_strong` is above half of the "
        f"largest activation.\n\n{table(frame.sort_values('specificity', ascending=False).head(20))}"
    )


def noising(figures: Any) -> str:
    task = figures["task"]
    return (
        f"## Indirect object identification\n\nSmolLM2 does the task: logit difference {task['mean']:.2f} (standard error "
        f"{task['se']:.2f}), {task['correct']} of {task['n']} prompts (names, places and sentences of our own).\n\nAttention "
        "output of blocks 16, 17 and 18 at S2 replaced by that of other prompts, or by zero (the paper: 93% kept with other "
        'names, 43% with "alongside", GPT-2\'s blocks 5 and 6):\n\n' + table(figures["noising"])
    )


def effects(figures: Any) -> str:
    frame = pd.DataFrame(figures["effects"]).sort_values("change").head(6)
    return (
        f"Blocks whose attention output at S2, set to zero, costs most (prompts of seed 1):\n\n{table(frame)}\n\nNoising of "
        f"the three worst, blocks {', '.join(map(str, figures['blocks']))}:\n\n{table(figures['noising'])}"
    )


def ablations(figures: Any) -> str:
    parts = ["## Single latents at S2\n\nEvery latent live at S2 and the error there taken out in turn, k 16: the five that "
             "move the logit difference most on the average prompt (`total`; `change` where live), and the error."]  # fmt: skip
    for block, rows in figures.items():
        frame = pd.DataFrame(rows).astype({"latent": "Int64"})
        chosen = pd.concat([frame[frame.part == "latent"].head(5), frame[frame.part == "error"]])
        parts.append(f"Block {block}, {int((frame.part == 'latent').sum())} live latents\n\n{table(chosen)}")
    return "\n\n".join(parts)


def order(figures: Any) -> str:
    return (
        "What is it? Each block's latent with the largest effect, at S2 of all prompts: on how many it is live and its mean "
        'activation, by the order of names (ABBA: the subject stands behind " and" the first time, BABA: before it) and by '
        f"the kind of prompt. An afterthought, looked at once the effects were known.\n\n{table(figures)}"
    )


def circuit(figures: Any) -> str:
    e = figures["example"]
    sums = []
    for depth, found in figures["depths"].items():
        s = found["sums"]
        sums.append({"depth": depth, **s, "gap / absolute": abs(s["gap"]) / s["absolute"]})
    last = list(figures["depths"].values())[-1]["nodes"]
    columns = [c for c in ("name", "token", "position", "contribution", "share") if c in last[0]]
    return (
        f"## One circuit\n\nLatent {figures['latent']} of block 17 (k 16) at its strongest firing, “…{e['text']}” (most from "
        f"“{e['before_source']}[{e['source_token']}]”), followed back through SAEs of the stream before blocks 17, 16 and 2 "
        f"and of the attention of 16 and 2 (k 32).\n\n{table(sums)}\n\nThe largest nodes at depth "
        f"{list(figures['depths'])[-1]}:\n\n{table(pd.DataFrame(last)[columns])}"
    )
