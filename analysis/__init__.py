"""Analyses of trained autoencoders, imported as `saelab.analysis`: start at `dark_matter` and `pursuit`."""

from saelab.base.lazy import lazily

__getattr__, __dir__ = lazily(
    globals(),
    {"pursuit": "saelab.analysis.dark_matter"},  # the contract's name of it
    subpackages=("attention", "circuits", "dark_matter", "denoisers"),
)
