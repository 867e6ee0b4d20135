"""Evaluation: what is lost when the autoencoder stands in for the activation."""
