"""Diffusion models and continuous flows: one family of paths from data to noise.

Read in this order: `diffusion` has the discrete chain of DDPM, `integrators` solves ordinary differential equations,
`cnf` turns one into a density model, `paths` joins data and noise and translates between what a network may predict,
`flow_matching` trains it without solving anything. `mixture` is a case in which everything is known exactly, and
`networks` holds the networks of this and the next chapters.

Time is that of the book: data at t = 0, noise at t = 1.
"""
