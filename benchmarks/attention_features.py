"""Attention-output features of SmolLM2: head scores, SAEs on hook_z, families, heads and IOI.

    python benchmarks/attention_features.py saes       activations of 115,671 tokens, then SAEs of four blocks' hook_z and of
                                                       the residual stream before three; about an hour on one core, resumable
    python benchmarks/attention_features.py study      every finding, a file each under the folder: the next call goes on
    python benchmarks/attention_features.py report     writes results/attention_features.md from what is there
    python benchmarks/attention_features.py all --toy --out trial.md

The SAEs are trained on the train split; families, heads and sources are measured on documents of the held-out split. Sites,
sizes, rules and seeds were fixed before anything was measured (`FULL`, and the constants of `attention_families`).
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import workers

import saelab
from saelab.analysis import attention
from saelab.analysis.attention import induction, ioi, proxies
from saelab.analysis.circuits import recursive_dfa
from saelab.base.files import whole_file
from saelab.models.tokens import Tokens

Z_BLOCKS, RESIDUAL_BLOCKS = (17, 16, 18, 2), (17, 16, 2)
KS = (16, 32)
FULL = {
    "tokens": 85_671, "heldout": 30_000, "training": 250_000, "batch": 2048, "d_sae": 1024, "d_residual": 2048,
    "read": 4_096, "examples": 8, "contexts": 16, "prompts": 40, "ablated": 8, "effects": 8, "permutations": 10_000,
}  # fmt: skip
TOY = {
    "tokens": 2_000, "heldout": 1_000, "training": 4_000, "batch": 256, "d_sae": 128, "d_residual": 128,
    "read": 512, "examples": 2, "contexts": 2, "prompts": 8, "ablated": 2, "effects": 4, "permutations": 200,
}  # fmt: skip
SHOWN = {"induction": "induction", "previous token": "previous_token"}  # family -> its share


def z_site(block: int) -> str:
    return f"blocks.{block}.attn.hook_z"


def residual_site(block: int) -> str:
    return f"blocks.{block}.hook_resid_pre"


class Study:
    """The rows of every site, the SAEs trained on them, and the findings, all kept in a folder."""

    def __init__(self, size: dict[str, Any], folder: Path) -> None:
        self.size, self.folder = size, folder
        self.lm, self.corpus = saelab.load_model("smollm2-135m"), saelab.load_corpus("sotu", seed=0)

    def rows(self, split: str) -> Any:
        sites = [z_site(b) for b in sorted(Z_BLOCKS)] + [residual_site(b) for b in sorted(RESIDUAL_BLOCKS)]
        tokens = self.size["tokens" if split == "train" else "heldout"]
        return saelab.harvest(
            self.lm, self.corpus, sites=sites, tokens=tokens, split=split, out=self.folder / "rows" / split
        )

    def runs(self, site: str) -> Any:
        """Runs of one site: k 16 and 32 on hook_z, k 32 on the residual stream."""
        attention = site.endswith("hook_z")
        d_sae = self.size["d_sae" if attention else "d_residual"]
        saes = [saelab.TopK(k=k, d_sae=d_sae) for k in (KS if attention else KS[-1:])]
        return saelab.sweep(
            self.rows("train")[site], saes, tokens=self.size["training"], batch_size=self.size["batch"], seed=0,
            out=self.folder / "saes" / site,
        )  # fmt: skip

    def saes(self) -> None:
        self.rows("heldout")
        for site in (*map(z_site, Z_BLOCKS), *map(residual_site, RESIDUAL_BLOCKS)):
            self.runs(site)

    @cached_property
    def trained(self) -> dict[int, dict[int, Any]]:
        """The SAEs of hook_z by block and k."""
        return {block: {run.sae.cfg.k: run.sae for run in self.runs(z_site(block))} for block in Z_BLOCKS}

    def untrained(self, sae: Any) -> Any:
        """Random decoder rows tied to the encoder, the bias and norm limit of a trained SAE: the control."""
        control = saelab.SAE(sae.cfg, sae.d_in, metadata=sae.metadata, seed=1)
        kept = {"decoder_bias", *(name for name in sae.state_dict() if name.startswith("state."))}
        own = control.state_dict()
        control.load_state_dict({name: sae.state_dict()[name] if name in kept else own[name] for name in own})
        return control

    def step(self, name: str, make: Callable[[], Any]) -> None:
        """Make a step's figures unless they are there."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return
        started = time.perf_counter()
        figures = make()
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(figures, indent=1))
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)

    def study(self) -> None:
        """Every finding."""
        self.step("heads", self.heads)
        self.step("agreement", self.agreement)
        for block in Z_BLOCKS:
            self.step(f"families-{block}", lambda block=block: self.block_families(block))
        self.step("ioi", self.ioi_noising)
        self.step("ioi-latents", self.ioi_latents)
        self.step("ioi-order", self.ioi_order)
        self.step("circuit", self.circuit)
        self.step("prefixes", self.prefixes)
        self.step("effects", self.ioi_effects)

    def heads(self) -> Any:
        return induction.head_scores(self.lm, seed=0).to_dict("records")

    def prefixes(self) -> Any:
        """The long-prefix protocol on the three best induction heads, and its natural variant on the same ones."""
        scores = json.loads((self.folder / "heads.json").read_text())
        best = sorted(scores, key=lambda row: -row["induction"])[:3]
        heads = [(row["block"], row["head"]) for row in best]
        natural = {}
        for head in heads:
            try:
                table = induction.natural_prefixes(self.lm, self.corpus, head, contexts=self.size["contexts"], seed=0)
                natural[f"{head[0]}.{head[1]}"] = table.to_dict("records")
            except saelab.DataError as error:
                natural[f"{head[0]}.{head[1]}"] = str(error)
        random = induction.long_prefix(self.lm, heads, examples=self.size["examples"], seed=0)
        return {"random": random.to_dict("records"), "natural": natural}

    def agreement(self) -> Any:
        """Top head by weights against top head by attribution on held-out rows, trained and untrained."""
        heldout, found = self.rows("heldout"), []
        for block, by_k in self.trained.items():
            for k, sae in by_k.items():
                x = heldout[z_site(block)]
                for name, own in (("trained", sae), ("untrained", self.untrained(sae))):
                    compared = attention.head_agreement(
                        attention.head_attribution(own), attention.firing_head_attribution(own, x),
                        permutations=self.size["permutations"], seed=0,
                    )  # fmt: skip
                    found.append(
                        {"block": block, "k": k, "dictionary": name, "clear": compared.clear, **vars(compared)}
                    )
        return found

    def block_families(self, block: int) -> Any:
        """Families at k 16: real text, shuffled text, an untrained dictionary; examples and proxies."""
        sae, found = self.trained[block][KS[0]], {}
        cases = {"real": (sae, False), "shuffled": (sae, True), "untrained": (self.untrained(sae), False)}
        for name, (own, shuffled) in cases.items():
            families = attention.latent_families(
                own, self.lm, self.corpus, tokens=self.size["read"], shuffled=shuffled, seed=0
            )
            labels = families.labels
            found[name] = {
                "live": len(families.table), "tested": families.tested, "counts": families.counts().to_dict(),
                "chance": {m: families.matched_by_chance(m) for m in ("induction", "duplicate token")},
                "labels": {str(latent): label for latent, label in labels.items()},
            }  # fmt: skip
            if name == "real":
                found["examples"] = {family: self.examples(families, family) for family in SHOWN}
                found["proxies"] = self.proxies(families)
        return found

    def examples(self, families: attention.LatentFamilies, family: str) -> Any:
        """The three latents with the largest share of their family, with their four strongest firings."""
        mine = families.table[families.table.family == family].nlargest(3, SHOWN[family])
        return [
            {
                "latent": int(latent), "firings": int(row.firings), "share": float(row[SHOWN[family]]),
                "top_token": self.lm.token_text(int(row.top_token)), "top_token_share": float(row.top_token_share),
                "examples": families.examples(int(latent), k=4).to_dict("records"),
            }
            for latent, row in mine.iterrows()
        ]  # fmt: skip

    def proxies(self, families: attention.LatentFamilies) -> Any:
        """Each induction latent with one source token (at least half of its firings) against its proxy."""
        tokens, found = Tokens(families.ids, torch.ones_like(families.mask)), []
        usable = families.mask.clone()
        usable[:, :1] = False
        table = families.table
        for latent, row in table[(table.family == "induction") & (table.top_token_share >= 0.5)].iterrows():
            f = families.firings[families.firings.latent == latent]
            activation = torch.zeros(families.ids.shape)
            where = torch.tensor(f[["context", "destination"]].to_numpy().copy()).T
            activation[tuple(where)] = torch.tensor(f.activation.to_numpy().copy(), dtype=torch.float32)
            true = proxies.token_induction(self.lm, tokens, int(row.top_token))
            proxy = proxies.compare(activation, true, usable)
            strong = float(activation.max()) / 2
            found.append(
                {
                    "latent": int(latent), "token": self.lm.token_text(int(row.top_token)), "firings": len(f),
                    "specificity": proxy.specificity(), "specificity_strong": proxy.specificity(above=strong),
                    "sensitivity": proxy.sensitivity, "base_rate": proxy.base_rate,
                }
            )  # fmt: skip
        return found

    def ioi_noising(self) -> Any:
        prompts = ioi.prompts(self.lm, n=self.size["prompts"], seed=0)
        found = ioi.task(self.lm, prompts)
        task = {"mean": found.mean, "se": found.standard_error, "correct": found.correct, "n": len(prompts)}
        table = ioi.noising(self.lm, prompts, sorted(Z_BLOCKS)[1:], seed=0)
        return {"task": task, "noising": table.reset_index().to_dict("records")}

    def ioi_latents(self) -> Any:
        """Every live latent of four blocks at S2 taken out, k 16."""
        prompts = ioi.prompts(self.lm, n=self.size["ablated"], seed=0)
        tables = {block: ioi.ablate_latents(self.lm, self.trained[block][KS[0]], prompts) for block in sorted(Z_BLOCKS)}
        return {
            str(block): json.loads(ioi.by_latent(table, len(prompts)).to_json(orient="records"))
            for block, table in tables.items()
        }

    def ioi_order(self) -> Any:
        """Of each block's latent with the largest effect: its activation at S2 by the order of names and kind of prompt."""
        effects = json.loads((self.folder / "ioi-latents.json").read_text())
        prompts = ioi.prompts(self.lm, n=self.size["prompts"], seed=0)
        cases = {
            "clean": prompts,
            "alongside": prompts.alongside(self.lm),
            "other names": prompts.with_other_names(self.lm),
        }
        found = []
        for block in sorted(Z_BLOCKS):
            latent = next(row["latent"] for row in effects[str(block)] if row["part"] == "latent")
            sae = self.trained[block][KS[0]]
            for name, own in cases.items():
                x = self.lm.record(own.tokens, z_site(block))[torch.arange(len(own)), own.s2]
                activation = sae.encode(x)[:, latent].detach()
                for order, chosen in (("ABBA", own.abba == 1), ("BABA", own.abba == 0)):
                    mine = activation[chosen]
                    found.append({"block": block, "latent": latent, "prompts": name, "order": order,
                                  "live": int((mine > 0).sum()), "of": len(mine), "mean": float(mine.mean())})  # fmt: skip
        return found

    def ioi_effects(self) -> Any:
        """Blocks whose attention output at S2 matters, and the noising of the three that matter most, on other prompts."""
        prompts = ioi.prompts(self.lm, n=self.size["effects"], seed=1)
        effects = ioi.zero_by_block(self.lm, prompts)
        worst = sorted(effects.change.nsmallest(3).index.tolist())
        others = ioi.prompts(self.lm, n=self.size["prompts"], seed=0)
        table = ioi.noising(self.lm, others, worst, seed=0)
        return {
            "effects": effects.reset_index().to_dict("records"), "blocks": worst,
            "noising": table.reset_index().to_dict("records"),
        }  # fmt: skip

    def circuit(self) -> Any:
        """The strongest firing of the most inductive latent of block 17, followed to its tokens."""
        families = json.loads((self.folder / f"families-{Z_BLOCKS[0]}.json").read_text())
        shown = families["examples"]["induction"] or families["examples"]["previous token"]
        if not shown:
            return None
        latent, example = shown[0]["latent"], shown[0]["examples"][0]
        contexts = self.corpus.contexts(self.lm, 256, "heldout")
        ids = contexts.ids[example["context"]][None, : example["destination"] + 1].long()
        saes = [self.trained[b][KS[-1]] for b in Z_BLOCKS[1:]] + [
            self.runs(residual_site(b))[0].sae for b in RESIDUAL_BLOCKS
        ]
        found = {}
        for depth in (1, 2, 4):
            traced = recursive_dfa.trace(
                self.trained[Z_BLOCKS[0]][KS[0]], self.lm, ids, latent, example["destination"], saes=saes, depth=depth
            )
            nodes = traced.to_pandas().sort_values("contribution", key=abs, ascending=False).head(16)
            found[str(depth)] = {"sums": vars(traced.sums), "nodes": json.loads(nodes.to_json(orient="records"))}
        return {"latent": latent, "example": example, "depths": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["saes", "study", "report", "all"])
    parser.add_argument("--toy", action="store_true", help="small sizes, for a trial")
    parser.add_argument("--folder", type=Path, help="where rows, SAEs and figures are kept (default: under .cache)")
    parser.add_argument("--out", type=Path, default=workers.RESULTS / "attention_features.md")
    options = parser.parse_args()
    folder = options.folder or workers.CACHE / ("attention-toy" if options.toy else "attention")
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(TOY if options.toy else FULL, folder)
    if options.what in ("saes", "all"):
        study.saes()
    if options.what in ("study", "all"):
        study.study()
    if options.what in ("report", "all"):
        from attention_features_report import write

        write(folder, study.size, options.out)


if __name__ == "__main__":
    main()
