"""Do latents steer? Effect of SAE latents against random directions at equal divergence, by decile of the output score.

    python benchmarks/steering_effect.py                  both sites, one to two hours on two cores; resumable
    python benchmarks/steering_effect.py --tokens 20000 --d-sae 256 --latents 20 --directions 10 --prompts 4 --out trial.md

At each site a TopK SAE is trained on the bundled model and corpus. Its latents are ranked by their output score on one
prompt ("From my experience,"; Arad et al. 2025) and tested on 20 others: a latent is added at the strength at which the
mean KL(clean || steered) of the next token is 1 nat, found by bisection, and its effect is the mean rise of the
probability of the ten top tokens of (W_dec * gain) W_U. Random directions, each at its own strength for the same KL,
are the controls twice: on their own ten top tokens, and on the latent's. A latent works when its effect is
above the 95th percentile of the controls on their own. Directions are kept as they finish (.cache/steering_effect), so that the
next call goes on. The expectation: at least 60% of the top decile work at blocks.22, and not at blocks.3.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workers
from tqdm import tqdm

import saelab
from saelab import steering
from saelab.base.files import whole_file
from saelab.models.tokens import Tokens, padded
from saelab.steering.summaries import spearman
from saelab.steering.text_measures import TOP_TOKENS
from saelab.training.checkpoint import check_fingerprint

SITES = ["blocks.22.hook_resid_post", "blocks.3.hook_resid_post"]
TARGET_KL = 1.0
TOLERANCE = 0.02
EXPECTED = 0.6
FIRINGS = 10  # of a latent in the last fifth of the training, to be tested at all
DIRECTIONS_AT_ONCE = 8
PROMPTS = [
    "The weather this morning is",
    "She opened the door and",
    "The best way to learn a language is",
    "In the middle of the night, the",
    "Scientists have discovered that",
    "My grandmother always told me to",
    "The company announced that its new",
    "To bake a good loaf of bread, you",
    "The president said on Tuesday that",
    "When I was a child, I wanted to",
    "The train to the city leaves at",
    "According to the report, most people",
    "He looked at the old map and",
    "The main character of the story is",
    "On the first day of school, the teacher",
    "If you want to save money, you should",
    "The river runs through a valley where",
    "After the game, the coach told the",
    "There are three reasons why",
    "The museum in the center of the town",
]


class Model:
    """The model on the test prompts: the next-token log-probabilities, unsteered and with each row's own direction."""

    def __init__(self, lm: Any, site: str, prompts: Sequence[str]) -> None:
        self.lm, self.site, self.n = lm, site, len(prompts)
        self.tokens = padded(lm.tokenize(list(prompts)).rows(), 0, left=True)
        self.clean_PV = self._log_probabilities(self.tokens)

    def steered(self, directions: Sequence[torch.Tensor], strengths: Sequence[float]) -> torch.Tensor:
        """[direction, prompt, vocabulary]; each direction is of length 1."""
        operations = [
            steering.add(steering.Direction(vector, self.site), strength=strength, unit="activation")
            for vector, strength in zip(directions, strengths, strict=True)
        ]
        n = len(operations)
        batch = Tokens(self.tokens.ids.repeat(n, 1), self.tokens.mask.repeat(n, 1))
        with steering.steer_rows(self.lm, [[operation] for operation in operations for _ in range(self.n)]):
            return self._log_probabilities(batch).view(n, self.n, -1)

    def divergence(self, steered_NPV: torch.Tensor) -> list[float]:
        """Mean KL(clean || steered) over the prompts, nats."""
        return (self.clean_PV.exp() * (self.clean_PV - steered_NPV)).sum(-1).mean(1).tolist()

    def rises(self, steered_PV: torch.Tensor, tokens_LK: torch.Tensor) -> list[float]:
        """Mean rise over the prompts of the mass on each row of tokens."""
        change_PV = steered_PV.exp() - self.clean_PV.exp()
        return change_PV[:, tokens_LK].sum(-1).mean(0).tolist()

    @torch.no_grad()
    def _log_probabilities(self, tokens: Tokens) -> torch.Tensor:
        tokens = tokens.to(self.lm.device)
        logits = self.lm.backend.logits(tokens.ids, tokens.mask, last_only=True)[0][:, -1]
        return logits.float().log_softmax(-1).cpu()


def at_equal_divergence(
    model: Model, directions: Sequence[torch.Tensor], start: float
) -> list[tuple[float, float, torch.Tensor] | None]:
    """For each direction (strength, KL, log-probabilities) where the KL is the target's; None where it never is.

    Doubling from `start` until the KL is above, then bisection of the strength on a logarithmic scale.
    """
    n = len(directions)
    low, high, strengths = [0.0] * n, [float("inf")] * n, [start] * n
    found: list[tuple[float, float, torch.Tensor] | None] = [None] * n
    for _ in range(40):
        left = [i for i in range(n) if found[i] is None and 1e-6 * start < strengths[i] < 1e4 * start]
        if not left:
            break
        steered = model.steered([directions[i] for i in left], [strengths[i] for i in left])
        for i, divergence, rows in zip(left, model.divergence(steered), steered, strict=True):
            if abs(divergence - TARGET_KL) < TOLERANCE:
                found[i] = (strengths[i], divergence, rows)
            elif divergence < TARGET_KL:
                low[i] = strengths[i]
            else:
                high[i] = strengths[i]
            if high[i] == float("inf"):
                strengths[i] *= 2
            else:
                strengths[i] = (low[i] * high[i]) ** 0.5 if low[i] else high[i] / 2
    return found


def measured(folder: Path, lm: Any, site: str, sae: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Every latent and every random direction at one site, read from the folder or measured now."""
    candidates = torch.tensor([i for i in range(sae.d_sae) if int(sae.state.fires[i]) >= FIRINGS])
    generator = torch.Generator().manual_seed(args.seed)
    latents = sorted(candidates[torch.randperm(len(candidates), generator=generator)[: args.latents]].tolist())
    vectors = torch.randn(args.directions, sae.d_in, generator=generator)
    W_dec = sae.W_dec.detach()
    tops = steering.top_tokens(lm, W_dec[latents], TOP_TOKENS)
    own = steering.top_tokens(lm, vectors, TOP_TOKENS)
    model = Model(lm, site, PROMPTS[: args.prompts])
    start = 0.05 * float(sae.metadata["median_norm"])
    jobs = [("latent", i, W_dec[latent]) for i, latent in enumerate(latents)]
    jobs += [("direction", i, vectors[i]) for i in range(args.directions)]
    todo = [job for job in jobs if not (folder / f"{job[0]}-{job[1]:05d}.json").exists()]
    for begin in tqdm(range(0, len(todo), DIRECTIONS_AT_ONCE), desc=site, disable=not todo):
        part = todo[begin : begin + DIRECTIONS_AT_ONCE]
        units = [vector / vector.norm() for _, _, vector in part]
        for (kind, i, _), found in zip(part, at_equal_divergence(model, units, start), strict=True):
            row: dict[str, Any] = {"reached": found is not None}
            if found is not None:
                strength, divergence, rows = found
                row |= {"strength": strength, "kl": divergence}
                if kind == "latent":
                    row["effect"] = model.rises(rows, tops[i : i + 1])[0]
                else:
                    row |= {"own": model.rises(rows, own[i : i + 1])[0], "on_latents": model.rises(rows, tops)}
            write(folder / f"{kind}-{i:05d}.json", row)
    path = folder / "scores.json"
    if not path.exists():
        write(path, {"output_score": steering.output_scores(lm, sae, latents, site=site)})
    return {
        "latents": latents,
        "candidates": len(candidates),
        "output_score": json.loads(path.read_text())["output_score"],
        "of_latents": [json.loads((folder / f"latent-{i:05d}.json").read_text()) for i in range(len(latents))],
        "of_directions": [json.loads((folder / f"direction-{i:05d}.json").read_text()) for i in range(args.directions)],
    }


def write(path: Path, content: Any) -> None:
    """One file, whole."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content))


def verdicts(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """For each latent that reached the KL: output score, effect, and whether it is above either control's 95%."""
    kept = [i for i, row in enumerate(found["of_latents"]) if row["reached"]]
    controls = [row for row in found["of_directions"] if row["reached"]]
    effects = np.array([found["of_latents"][i]["effect"] for i in kept])
    on_latents = np.array([row["on_latents"] for row in controls])[:, kept]
    on_own = np.array([row["own"] for row in controls])
    return {
        "score": np.array(found["output_score"])[kept],
        "effect": effects,
        "control": on_latents.mean(0),
        "above": effects > np.quantile(on_latents, 0.95, axis=0),
        "above_own": effects > np.quantile(on_own, 0.95),
        "on_own": on_own,
    }


def by_decile(latents: dict[str, np.ndarray]) -> list[list[object]]:
    """A row of the table for each tenth of the latents, the highest output scores first."""
    order = np.argsort(-latents["score"], kind="stable")
    rows: list[list[object]] = []
    for number, part in enumerate(np.array_split(order, 10), start=1):
        if not len(part):
            continue
        scores, effects = latents["score"][part], latents["effect"][part]
        rows.append(
            [number, len(part), f"{scores.min():.3f} to {scores.max():.3f}", f"{effects.mean():.4f}",
             f"{np.median(effects):.4f}", f"{latents['control'][part].mean():.4f}",
             share(latents["above_own"][part]), share(latents["above"][part])]
        )  # fmt: skip
    return rows


def share(above: np.ndarray) -> str:
    """A share with its 95% Wilson interval."""
    n, p, z = len(above), above.mean(), 1.96
    centre, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = max(0.0, centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return f"{p:.0%} ({low:.0%} to {high:.0%})"


def section(site: str, sae: Any, found: dict[str, Any]) -> str:
    """The report on one site."""
    latents = verdicts(found)
    header = ["decile", "latents", "output score", "mean effect", "median", "random directions, mean",
              "above their 95% on their own tokens", "above their 95% on its tokens"]  # fmt: skip
    reached = [sum(row["reached"] for row in found[name]) for name in ("of_latents", "of_directions")]
    top = np.argsort(-latents["score"], kind="stable")[: max(1, round(len(latents["score"]) / 10))]
    shares = [latents[name][top].mean() for name in ("above", "above_own")]
    strengths = [
        np.median([row["strength"] for row in found[name] if row["reached"]]) / sae.metadata["median_norm"]
        for name in ("of_latents", "of_directions")
    ]
    return "\n".join(
        [
            f"## {site}",
            "",
            f"**{share(latents['above_own'])} of all latents** raise their own top tokens more than 95% of random directions "
            f"raise theirs (mean {latents['on_own'].mean():.4f}, 95% {np.quantile(latents['on_own'], 0.95):.4f}); of the top "
            f"decile by output score {shares[1]:.0%}, where at least {EXPECTED:.0%} was expected at a late site "
            f"({'' if shares[1] >= EXPECTED else 'not '}reached). Spearman of output score and effect "
            f"{spearman(latents['score'], latents['effect']):.2f}.",
            "",
            f"On the latent's own tokens, where a random direction has little to raise, {share(latents['above'])} of all "
            f"latents and {shares[0]:.0%} of the top decile are above it: an easy control, shown for completeness.",
            "",
            workers.table(header, by_decile(latents)),
            "",
            f"KL of 1 nat (within {TOLERANCE}) was found for {reached[0]} of {len(found['of_latents'])} latents and "
            f"{reached[1]} of {len(found['of_directions'])} random directions, at {strengths[0]:.2f} and "
            f"{strengths[1]:.2f} median norms (medians). Drawn from {found['candidates']:,} latents with at least "
            f"{FIRINGS} firings; SAE: {sae.cfg!r}, median norm {sae.metadata['median_norm']:.1f}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", nargs="+", default=SITES)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--latents", type=int, default=400)
    parser.add_argument("--directions", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="steering_effect.md", help="under benchmarks/results")
    args = parser.parse_args()

    machine = workers.machine(torch.get_num_threads())
    lm, corpus = saelab.load_model("smollm2-135m"), saelab.load_corpus("sotu")
    training = {"tokens": args.tokens, "d_sae": args.d_sae, "k": args.k, "seed": args.seed}
    sizes = {"latents": args.latents, "directions": args.directions, "prompts": PROMPTS[: args.prompts]}
    parts = []
    for site in args.sites:
        name = "-".join([site, *(f"{key}{value}" for key, value in training.items())])
        folder = workers.CACHE / "steering_effect" / name
        cfg = saelab.TopK(k=args.k, d_sae=args.d_sae)
        run = saelab.train(lm, corpus, site=site, sae=cfg, tokens=args.tokens, seed=args.seed, out=folder / "run")
        if run.interrupted:
            return
        settings = {"model": lm.digest, "site": site, **training, **sizes}
        results = folder / f"{args.latents}-{args.directions}-{args.prompts}"
        fingerprint = results / "settings.json"
        if fingerprint.exists():
            check_fingerprint(results, json.loads(fingerprint.read_text()), settings)
        else:
            write(fingerprint, settings)
        parts.append(section(site, run.sae, measured(results, lm, site, run.sae, args)))
    workers.write_result(
        args.out,
        "\n".join(
            [
                f"# Steering by latents, SmolLM2-135M, at KL {TARGET_KL:g} nat on {args.prompts} prompts",
                "",
                f"{args.latents} latents and {args.directions} random directions a site; effect: mean rise of the "
                f"probability of {TOP_TOKENS} tokens; shares with 95% Wilson intervals; SAEs trained on {args.tokens:,} "
                f"tokens, seed {args.seed}. {machine}.",
                "",
                *parts,
            ]
        ),
    )


if __name__ == "__main__":
    main()
