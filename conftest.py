"""Loaded by every pytest run of this repository: notebooks are compared by their numbers."""

pytest_plugins = ["tools.compare"]
