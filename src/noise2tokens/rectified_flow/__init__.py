"""Rectified flow: learn a velocity along straight lines, then train again on the pairs that the flow itself makes.

`reflow`: lines, losses, times, pairs, training, sampling, reflow and distillation. `measures`: what pairs cost, how
straight a flow is and how much its lines cross. `experiment`: eight Gaussians and MNIST.
"""
