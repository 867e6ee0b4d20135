"""Latents traced back through frozen layers to features of the stream and to tokens."""
