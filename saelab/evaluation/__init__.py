"""Evaluation: what is lost when the autoencoder stands in for the activation, and what its latents are good for."""

from saelab.base.lazy import lazily

__getattr__, __dir__ = lazily(globals(), {}, subpackages=("synthetic",))
