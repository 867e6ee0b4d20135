"""The commands of the command line, one a file; `saelab.cli` puts them together."""
