"""Analyses of trained autoencoders, imported as `saelab.analysis`. Nothing is here yet."""
