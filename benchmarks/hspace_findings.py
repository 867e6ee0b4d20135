"""Findings in the h-space of the bundled denoisers: seeds and settings are fixed here, results are tabled either way.

    python benchmarks/hspace_findings.py                                 everything; resumable, about ten minutes of one core
    python benchmarks/hspace_findings.py pca --denoisers digits-unet     one study of one denoiser
    python benchmarks/hspace_findings.py --toy --out trial.md            seconds

Directions come from one set of samples (seed 0, eta 1) and are tried on another (seed 1): 500, 100 and 50 steps for the 8x8
digits, 200, 50 and 25 steps for the 28x28 ones. Expected beforehand:

- pca: components change the image at least twice as much as isotropic random directions of equal norm (strengths 1 and 2);
  that bar is low (nearly any direction along which h varies passes it), so that the covariance-matched ratio leads;
- mean: the probability of a class rises with the strength of its mean difference, Spearman at least .9 over strengths 0, .25,
  .5, 1 and 1.5 for at least 7 of 10 classes, from chance to above .5;
- projection: at equal effect on the target, what the direction does to the classes projected out is smaller;
- jacobian: singular values within 1% of the exact ones, cosines of well separated vectors above .99;
- inversion, spectrum, probes: tabled.

Each study of each denoiser is kept in .cache/hspace_findings under the digest of the weights.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import saelab
from saelab import hspace
from saelab.analysis.denoisers import geometry, probes
from saelab.base.files import whole_file
from saelab.hspace.effect_measures import CONTROLS

HERE = Path(__file__).parent
CACHE = HERE / ".cache" / "hspace_findings"
SIZES = {"digits-unet": (500, 100, 50), "mnist-unet": (200, 50, 25)}  # pool, edited samples, steps: as two cores allow
TOY = (40, 6, 4)
COMPONENTS, DRAWS = 3, 2
LEADING = ("covariance", "isotropic")  # the control that is hard to beat first
FIGURES = ("rms", "flip_rate", "confidence", "identity")
RISING = [0.0, 0.25, 0.5, 1.0, 1.5]
PROJECTED = {3: (5, 8, 9), 4: (1, 6, 9), 7: (1, 2, 9)}  # direction: classes whose directions are taken out
PROJECTED_STRENGTHS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
Table = list[dict[str, Any]]


class Setting:
    """What the studies share: the denoiser, the pool and its labels, the samples that are edited; made when asked for."""

    def __init__(self, name: str, toy: bool) -> None:
        self.denoiser = saelab.load_denoiser(name, device="cpu")
        self.n, self.test, self.steps = TOY if toy else SIZES[name]
        self.toy = toy
        self._made: dict[str, Any] = {}

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def pool(self) -> hspace.Trajectory:
        return self._once("pool", lambda: hspace.sample(
            self.denoiser, self.n, steps=self.steps, eta=1.0, seed=0, record=("h",)))  # fmt: skip

    @property
    def samples(self) -> hspace.Trajectory:
        return self._once("samples", lambda: hspace.sample(
            self.denoiser, self.test, steps=self.steps, eta=1.0, seed=1, record=("x",)))  # fmt: skip

    @property
    def labels(self) -> torch.Tensor:
        with torch.no_grad():
            return self.denoiser.classifier()(self.pool.samples).argmax(1)

    @property
    def towards(self) -> dict[int, hspace.Directions]:
        present = self.labels.unique().tolist()
        return {k: hspace.mean_difference(self.pool, self.labels, k) for k in present}


def pca(setting: Setting) -> Table:
    """Components against random directions of equal norm."""
    directions = hspace.pca(setting.pool, COMPONENTS)
    rows = []
    for direction in directions:
        for strength in (1.0, 2.0):
            drawn = [(kind, hspace.random_direction(direction, setting.pool, kind, seed))
                     for kind in CONTROLS for seed in range(DRAWS)]  # fmt: skip
            for kind, variant in [("edit", direction), *drawn]:
                found = hspace.effects(setting.denoiser, setting.samples, variant, [strength], controls=(), kept=0)
                row = found.table.iloc[0]
                rows.append({"component": direction.name, "strength": strength, "kind": kind,
                             **{name: float(row[name]) for name in FIGURES}})  # fmt: skip
    means = pd.DataFrame(rows).groupby(["component", "strength", "kind"], sort=False).mean().unstack("kind")
    table = []
    for (component, strength), row in means.iterrows():
        table.append({"component": component, "strength": strength, "rms": row["rms", "edit"],
                      **{f"rms ratio to {kind}": row["rms", "edit"] / row["rms", kind] for kind in LEADING},
                      **{f"flips {kind}": row["flip_rate", kind] for kind in ("edit", *LEADING)},
                      "confidence": row["confidence", "edit"], "identity": row["identity", "edit"]})  # fmt: skip
    return table


def mean(setting: Setting) -> Table:
    """Mean differences: does the probability of the class rise with the strength?"""
    directions = [made[0] for made in setting.towards.values()]
    found = hspace.effects(setting.denoiser, setting.samples, directions, RISING, controls=(), kept=0,
                           data=setting.denoiser.examples()[0])  # fmt: skip
    order = found.monotonicity().set_index("direction")
    table = []
    for name, mine in found.table.groupby("direction", sort=False):
        last = mine.iloc[-1]
        table.append({"direction": name, **{f"P at {row.strength:g}": row.p_target for row in mine.itertuples()},
                      "Spearman": order.spearman[name], "identity": last.identity, "off target": last.off_target,
                      "confidence": last.confidence, "to data": last.nearest})  # fmt: skip
    return table


def projection(setting: Setting) -> Table:
    """Directions with others projected out: what they do to those classes at equal effect on their own."""
    table = []
    for target, others in PROJECTED.items():
        if not {target, *others} <= set(setting.towards):
            continue
        plain = setting.towards[target]
        clean = plain.project_out([setting.towards[k][0] for k in others])
        left = clean[0].delta(setting.pool.timesteps).flatten()
        spans = [setting.towards[k][0].delta(setting.pool.timesteps).flatten() for k in others]
        cosines = [float(torch.cosine_similarity(left, span, 0)) for span in spans]
        curves = {}
        for name, made in (("plain", plain), ("projected", clean)):
            found = hspace.effects(setting.denoiser, setting.samples, made, PROJECTED_STRENGTHS, controls=(), kept=0,
                                   targets={made[0].name: target})  # fmt: skip
            rows = found.table.sort_values("strength")
            curves[name] = {"target": rows.change_target.cummax().to_numpy(),
                            "signed": rows[[f"change_{k}" for k in others]].mean(axis=1).to_numpy(),
                            "absolute": rows[[f"change_{k}" for k in others]].abs().mean(axis=1).to_numpy(),
                            "all": rows.off_target.to_numpy()}  # fmt: skip
        equal = 0.8 * min(curve["target"].max() for curve in curves.values())
        for name, curve in curves.items():
            table.append({"direction": f"towards {target}", "out": " ".join(map(str, others)), "kind": name,
                          "largest cosine": max(map(abs, cosines)) if name == "projected" else None, "target": equal,
                          **{f"off target, {what}": at(curve["target"], curve[what], equal)
                             for what in ("signed", "absolute", "all")}})  # fmt: skip
    return table


def at(target: Any, other: Any, value: float) -> float:
    """The other figure where the target's first reaches a value, on the line between two strengths."""
    i = int((target >= value).argmax())
    share = (value - target[i - 1]) / (target[i] - target[i - 1])
    return float(other[i - 1] + share * (other[i] - other[i - 1]))


def jacobian(setting: Setting) -> Table:
    """Subspace iteration against the exact decomposition, on the first sample."""
    table = []
    one = hspace.sample(setting.denoiser, 1, steps=20, eta=1.0, seed=0)
    for step in (3, 8, 13, 17):
        found = hspace.jacobian(setting.denoiser, one, step, 5)
        _, exact, right = torch.linalg.svd(exact_jacobian(setting.denoiser, one, step), full_matrices=False)
        values = found.details["singular_values"].flatten().double()
        apart = torch.minimum(exact[:5] / exact[1:6], torch.cat([torch.tensor([9.0]), exact[:4]]) / exact[:5]) > 1.05
        cosines = (found.vectors.flatten(1).double() * right[:5]).sum(1).abs()
        subspace = torch.linalg.svdvals(found.vectors.flatten(1).double() @ right[:5].T)
        table.append({"t": int(one.timesteps[step]), "largest": exact[0].item(), "fifth/sixth": (exact[4] / exact[5]).item(),
                      "iterations": int(found.details["iterations"][0]), "largest error of a value": float((values /
                      exact[:5] - 1).abs().max()), "apart by 5%": int(apart.sum()), "least cosine of those":
                      float(cosines[apart].min()) if apart.any() else None, "least cosine of the subspace":
                      float(subspace.min())})  # fmt: skip
    return table


def exact_jacobian(denoiser: saelab.Denoiser, trajectory: hspace.Trajectory, step: int) -> torch.Tensor:
    """d epsilon / d h [outputs, inputs] by one reverse pass an output, in float64."""
    x, h, t = trajectory.x[:1, step], trajectory.h[:1, step], int(trajectory.timesteps[step])

    def epsilon(h: torch.Tensor) -> torch.Tensor:
        with denoiser.intervene(trajectory.site, lambda *_: h):
            return denoiser.epsilon(x, t).flatten()

    return torch.autograd.functional.jacobian(epsilon, h).flatten(1).double()


def inversion(setting: Setting) -> Table:
    """Reconstruction errors of real images."""
    n = 4 if setting.toy else 32
    table = []
    for dtype in (torch.float32, torch.float64):
        denoiser = setting.denoiser if dtype == torch.float32 else setting.denoiser.to(dtype)
        images = denoiser.examples()[0][:n] if dtype == torch.float32 else setting.denoiser.examples()[0][:n].double()
        for method in ("ddim", "edit-friendly", "edict"):
            found = hspace.invert(denoiser, images, method=method, steps=setting.steps)
            table.append({"method": method, "dtype": str(dtype).removeprefix("torch."),
                          "largest error": float(found.errors.max()), "mean of largest": float(found.errors.mean()),
                          "mean square of x_T": float(found.start.flatten(1).square().mean())})  # fmt: skip
    return table


def spectrum(setting: Setting) -> Table:
    """Rank and effective dimension of the posterior mean's Jacobian along the noise."""
    small = setting.denoiser.sample_shape[-1] <= 8 and not setting.toy
    some = setting.samples[: 3 if small else 1]
    steps = range(0, setting.steps, max(1, setting.steps // (10 if small else 5)))
    return geometry.jacobian_spectrum(setting.denoiser, some, list(steps)).to_dict("records")


def probing(setting: Setting) -> Table:
    """Linear probes of the class by timestep, on the images that the denoiser was not trained on."""
    images, labels = setting.denoiser.examples()
    found = probes.probe_timesteps(setting.denoiser, images, labels, (0, 100, 200, 300, 400, 600), pooled=True)
    return found.pivot(index="t", columns="site", values="accuracy").reset_index().to_dict("records")


STUDIES: dict[str, Callable[[Setting], Table]] = {
    "pca": pca, "mean": mean, "projection": projection, "jacobian": jacobian, "inversion": inversion, "spectrum": spectrum,
    "probes": probing,
}  # fmt: skip


def verdict(study: str, table: pd.DataFrame) -> str:
    """What was expected, and what came out."""
    if study == "pca":
        covariance, isotropic = (table[f"rms ratio to {kind}"] for kind in LEADING)
        return (
            f"A component changes the image {covariance.min():.2f} to {covariance.max():.2f} times as much as a "
            f"random direction with the covariance of h (means of {DRAWS} draws: no interval). Isotropic "
            f"directions mostly point where "
            f"h does not vary: at least 2 times one was expected, and is so for {int((isotropic >= 2).sum())} of {len(table)} "
            f"({isotropic.min():.1f} to {isotropic.max():.1f})."
        )
    if study == "mean":
        last = table.filter(like="P at").iloc[:, -1]
        return (
            f"Expected a Spearman correlation of at least .9 for 7 of 10 classes: {int((table.Spearman >= 0.9).sum())} of "
            f"{len(table)}. Expected above .5 at the greatest strength: {int((last > 0.5).sum())} of {len(table)} "
            f"(mean {last.mean():.2f})."
        )
    if study == "projection":
        parts = table.set_index(["direction", "kind"])["off target, absolute"].unstack("kind")
        return (
            f"Expected less effect on the classes projected out at equal effect on the target: "
            f"{int((parts.projected < parts.plain).sum())} of {len(parts)}. Largest cosine left "
            f"{table['largest cosine'].max():.1e} (bar 1e-5)."
        )
    if study == "jacobian":
        return (
            f"Largest error of a singular value {table['largest error of a value'].max():.1e} (bar 1e-2); least cosine of a "
            f"vector whose value is 5% from its neighbours' {table['least cosine of those'].min():.4f} (bar .99)."
        )
    return ""


def report(names: list[str], toy: bool) -> str:
    """The markdown of every cell there is."""
    parts = [
        "# h-space findings",
        "",
        "Made by `benchmarks/hspace_findings.py`, where settings and expectations are.",
        "",
    ]
    for name in names:
        digest = saelab.load_denoiser(name).digest
        missing = [study for study in STUDIES if not cell(digest, study, toy).exists()]
        parts += [
            f"## {name} (weights {digest[:12]})",
            "",
            *([f"Not run: {', '.join(missing)}.", ""] if missing else []),
        ]
        for study, run in STUDIES.items():
            path = cell(digest, study, toy)
            if path.exists():
                table = pd.DataFrame(json.loads(path.read_text()))
                shown = table.map(lambda v: "" if pd.isna(v) else f"{v:.3g}" if isinstance(v, float) else v)
                rows = [list(shown.columns), ["---"] * len(shown.columns), *shown.itertuples(index=False)]
                lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
                doc = (run.__doc__ or "").split("\n")[0]
                parts += [f"### {study}: {doc}", "", *filter(None, [verdict(study, table)]), "", *lines, ""]
    return "\n".join(parts)


def cell(digest: str, study: str, toy: bool) -> Path:
    return CACHE / f"{digest[:16]}-{'toy-' if toy else ''}{study}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=list(STUDIES), metavar="study", help=", ".join(STUDIES))
    parser.add_argument("--denoisers", nargs="+", default=["digits-unet", "mnist-unet"])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "hspace.md")
    arguments = parser.parse_args()
    for name in arguments.denoisers:
        setting = Setting(name, arguments.toy)
        for study in arguments.studies:
            path = cell(setting.denoiser.digest, study, arguments.toy)
            if not path.exists():
                table = STUDIES[study](setting)
                with whole_file(path) as temporary:
                    temporary.write_text(json.dumps(table))
                print(f"{name} {study}: done", flush=True)
            with whole_file(arguments.out) as temporary:
                temporary.write_text(report(arguments.denoisers, arguments.toy))


if __name__ == "__main__":
    main()
