"""Analyses of trained autoencoders, imported as `saelab.analysis`: start at `dark_matter` and `pursuit`."""
