"""saelab on a real HookedTransformer (TransformerLens 3, in the sae-lens environment) against its own run_with_cache.

    python benchmarks/hooked_transformer.py            benchmarks/peers.sh sae-lens first

The models are small, random and built from a configuration: no hub. Every site that `sites()` lists is compared.
"""

import subprocess
import sys

import workers


def main() -> None:
    script = workers.HERE / "drivers" / "hooked_transformer_driver.py"
    result = subprocess.run([workers.peer_python("sae-lens"), str(script)], env=workers.environment(threads=1))
    sys.exit(result.returncode)


if __name__ == "__main__":
    main()
