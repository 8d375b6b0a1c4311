"""Fixtures of every test; the markers are described in pyproject.toml."""
