"""Turning one distribution into another, and saying how far apart two are.

`distances` compares two sets of samples without knowing a density, `quantile` is the exact transform in one dimension,
and `vae` and `gan` are two ways to train a map from noise to data.
"""
