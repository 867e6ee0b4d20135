"""Denoisers from inside: Jacobian spectra, feature dynamics, probes, exact oracles."""
