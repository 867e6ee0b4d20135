"""SAEs of other projects read as saelab's own, one file for each family of formats, and ours written for them.

>>> from saelab import interop
>>> interop.save_as  # doctest: +ELLIPSIS
<function save_as at ...>
"""

from typing import TYPE_CHECKING

from saelab.base.lazy import lazily

_PUBLIC = {"as_saelens": "saelab.interop.saelens_objects", "save_as": "saelab.interop.exports"}

__getattr__, __dir__ = lazily(globals(), _PUBLIC)

if TYPE_CHECKING:
    from saelab.interop.exports import save_as as save_as
    from saelab.interop.saelens_objects import as_saelens as as_saelens
