"""What the benchmark scripts share: libraries in processes of their own, the machine in words, markdown tables."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CACHE = HERE / ".cache"
PEERS = Path(os.environ.get("PEERS", HERE / ".peers"))
PEER_NAMES = ("sae-lens", "dictionary-learning", "sparsify")


def environment(threads: int) -> dict[str, str]:
    """The variables of every child: the checkout importable, a number of threads, no network, no tracker."""
    return {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "SPARSIFY_DISABLE_TRITON": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def peer_python(name: str) -> str:
    """The interpreter of a peer's environment; exits with the way to make it when it is missing."""
    python = PEERS / name / "bin" / "python"
    if not python.exists():
        sys.exit(f"{python} is missing: make the peers' environments with benchmarks/peers.sh, or set PEERS")
    return str(python)


class Worker:
    """A driver of `drivers/` in its own process; `ask` sends one command and waits for the answer."""

    def __init__(self, name: str, threads: int, **variables: str) -> None:
        python = peer_python(name) if name in PEER_NAMES else sys.executable
        script = HERE / "drivers" / f"{name.replace('-', '_')}_driver.py"
        self.log = CACHE / "logs" / f"{name}-{os.getpid()}-{id(self):x}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Answers come through a pipe of their own, because libraries print on standard output.
        reading, writing = os.pipe()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, str(script), "--answers", str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                pass_fds=[writing],
                env=environment(threads) | variables,
            )
        os.close(writing)
        self.answers = os.fdopen(reading)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one command of `drivers/protocol.py`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"a worker died; the end of {self.log}:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        if error is not None:
            self.process.kill()
        self.process.wait()
        self.answers.close()


def machine(threads: int) -> str:
    """One line: processor, cores, threads used, bf16 dot products, load, Python, torch."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if "model name" in line), platform.machine())
    bf16 = ", ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in info) or "none"
    load = f"{os.getloadavg()[0]:.2f}"
    return (
        f"{model}, {os.cpu_count()} cores, {threads} threads, bf16 dot products: {bf16}; load at the start {load}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_result(name: str, text: str) -> None:
    """Prints `text` and writes it to benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text + "\n")
    print(text)
