"""SAEs of other projects, read as saelab's own: one file for each family of formats."""
