"""Write SAEs of every kind in every format that can hold them, and open them in the library's own process.

    python benchmarks/opening.py [FORMAT ...]     a line each: the largest difference of codes and of reconstructions

Exits 1 where one is above 1e-5, times the largest value where that is above 1. The environments are those of `peers.sh`.
"""

import json
import shutil
import subprocess
import sys

import torch
from safetensors.torch import save_file
from workers import CACHE, HERE, environment, peer_python

from saelab import ConfigError
from saelab.interop import save_as
from tests.interop.kinds import KINDS, made, rows

PEER_OF = {
    "saelens": "sae-lens", "dictionary_learning": "dictionary-learning", "sparsify": "sparsify",
    "circuit-tracer": "circuit-tracer",
}  # fmt: skip


def main() -> int:
    worst = 0.0
    for format in sys.argv[1:] or PEER_OF:
        folder = CACHE / "opening" / format
        shutil.rmtree(folder, ignore_errors=True)
        limits, refused = {}, {}
        for name in KINDS:
            layers = [made(name, layer) for layer in range(2 if format == "circuit-tracer" else 1)]
            case = folder / name.replace(" ", "-")
            try:
                save_as(layers if len(layers) > 1 else layers[0], case / "sae", format)
            except ConfigError as error:
                refused[name] = str(error)
                continue
            x, sae = rows(), layers[-1]
            expected = {"x": x, "codes": sae.encode(x), "output": sae(x)}
            save_file({key: value.contiguous() for key, value in expected.items()}, case / "expected.safetensors")
            limits[case.name] = 1e-5 * max(1.0, *(float(value.abs().max()) for value in expected.values()))
        done = subprocess.run(
            [peer_python(PEER_OF[format]), str(HERE / "drivers" / "opening_driver.py"), format, str(folder)],
            capture_output=True, text=True, env=environment(1),
        )  # fmt: skip
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        found = json.loads(done.stdout.splitlines()[-1])
        for name, (codes, output) in found.items():
            worst = max(worst, codes / limits[name], output / limits[name])
            print(f"{format:22}{name:36}codes {codes:.1e}  reconstruction {output:.1e}")
        for name, why in refused.items():
            print(f"{format:22}{name:36}refused: {why}")
    print(f"{'all within' if worst <= 1 else 'NOT within'} 1e-5 of the largest value ({worst:.2f} of it)")
    return int(worst > 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
