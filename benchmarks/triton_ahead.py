"""Compile the Triton kernels ahead for sm_80 and sm_90, with no GPU, and say what each keeps in registers and spills.

python benchmarks/triton_ahead.py          # where `triton` is installed; ends with 1 where a kernel spills
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from saelab.kernels.gpu import programs

INT, LONG, FLOAT = "i32", "*i64", "*fp32"
SUM = {"BLOCK_D": 256, "BLOCK_E": 8}


def kernels(table):
    """(program, what each argument is, constants), of a table of that precision."""
    bags = {"indices": LONG, "weights": FLOAT, "offsets": LONG, "table": table, "out": FLOAT, "D": INT, "longest": INT}
    rest = {"indices": LONG, "weights": FLOAT, "offsets": LONG, "bags": LONG, "starts": LONG}
    rest |= {"table": table, "out": FLOAT, "D": INT, "longest": INT}
    sampled = {"x": FLOAT, "W": table, "rows": LONG, "indices": LONG, "out": FLOAT, "n_entries": INT, "D": INT}
    yield programs.bags_program, bags, SUM
    yield programs.rest_program, rest, SUM
    yield programs.join_program, {"first_part": LONG, "parts": FLOAT, "out": FLOAT, "D": INT}, {"BLOCK_D": 256}
    yield programs.sampled_program, sampled, {"BLOCK_E": 16, "BLOCK_D": 64}
    for k in (32, 64, 256):
        yield programs.top_program, {"scores": FLOAT, "keys": LONG, "F": INT}, {"K": k, "BLOCK_F": 1024}


def main():
    spilled = 0
    for arch in (80, 90):
        for table in (FLOAT, "*bf16"):
            for program, arguments, constants in kernels(table):
                signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
                places = {(list(signature).index(name),): value for name, value in constants.items()}
                source = ASTSource(fn=program, signature=signature, constexprs=places)
                compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "kernel.ptx"
                    path.write_text(compiled.asm["ptx"])
                    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
                    said = subprocess.run(
                        [get_ptxas(arch).path, "-v", f"--gpu-name={target}", path, "-o", path.with_suffix(".cubin")],
                        capture_output=True, text=True, check=True,
                    ).stderr  # fmt: skip
                spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
                registers = re.search(r"Used (\d+) registers", said)[1]
                spilled += spills > 0
                print(
                    f"{target:7} {program.__name__:16} {table:6} {constants} registers {registers} spilled {spills} B"
                )
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
