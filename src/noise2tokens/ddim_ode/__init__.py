"""DDIM and the probability-flow ODE: the same trained network, sampled without noise and in few steps.

Read in this order: `sampling` holds the discrete sampler and its sub-sequences of steps, `ode` the differential
equations that it is a discretization of (with better solvers, likelihoods and the heat equation), and `experiment`
trains a network and fills the table of the DDIM paper.

Time is that of the book: data at t = 0, noise at t = 1. Steps are those of chapter 4: n = 0 is the data, n = T noise.
"""
