"""Sparse autoencoders: one module for training and for inference, one file an architecture."""
