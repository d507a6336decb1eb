"""Gradient checkpointing: forget what the forward pass computed, and compute it again when the backward pass needs it.

schedules.py    what to keep, when and at what cost, on a chain whose layers are only counted
checkpoint.py   the two ways to tell autograd: a function of its own, and hooks on what others save
memory.py       what is kept: counted by formula, by autograd's hooks and over time; a limit that bites
models.py       a transformer layer whose activations are counted, and decoders that recompute
experiment.py   how much memory and how much time, measured
"""
