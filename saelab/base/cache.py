"""What can be made again, kept in one file of `write_tensors`.

One file rather than a folder, so that two processes that fill the cache at once cannot meet half-way: the last
`os.replace` wins and both wrote the same.
"""

from pathlib import Path

from jaxtyping import Shaped
from torch import Tensor

from saelab.base.errors import FormatError
from saelab.base.manifests import ALL, DIGEST, read_tensors
from saelab.base.tensors import CHECKSUM


def read(path: Path) -> tuple[dict[str, Shaped[Tensor, "..."]], dict[str, str]] | None:
    """The tensors and strings of a file written by `write_tensors`; None when it is missing, cut short or changed.

    The tensors lie in the memory-mapped file; writing to them never reaches it.

    >>> import tempfile, torch
    >>> from saelab.base.tensors import write_tensors
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> read(path) is None
    True
    >>> write_tensors(path, {"x": torch.arange(3)}, {"made by": "a test"})
    >>> read(path)
    ({'x': tensor([0, 1, 2])}, {'made by': 'a test'})
    """
    try:
        return read_tensors(path, {"*": (ALL, "...")}, strings={CHECKSUM: DIGEST})
    except FormatError:
        return None
