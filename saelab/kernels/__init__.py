"""Sparse kernels, each with a dense twin."""
