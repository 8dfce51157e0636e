"""Library of the notebook: the same code, importable."""
