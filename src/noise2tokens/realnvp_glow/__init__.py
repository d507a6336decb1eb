"""RealNVP and Glow: flows that stretch space differently at different points.

NICE shifts half of the coordinates by a function of the other half, so its volume never changes along the way. Here the
coupling also scales, and everything that a coupling needs in order to work on images is built around it: masks that
follow an image's grid, squeezing (space into channels), splitting (half of the coordinates leave early, as Gaussians
given the rest), activation normalization, and a learned linear map of the channels where NICE took turns.

Everything is a `Flow` of the last chapter and keeps its contract: latents have the shape of the data. For that,
`Squeeze` and `Split` are wrappers: each holds the flow that goes on inside, and puts its output back where it belongs.
A multi-scale model is a nest of them. `ActNorm` keeps no flag that says whether it has seen data: it starts as the
identity, and `initialize` sets all of them from one batch, when it is told to and never by itself.

Letters: c, h, w are channels, height and width; h is also what a network puts out before it becomes a log-scale.

`coupling`: the affine coupling, and RealNVP for points. `multiscale`: what images need, their RealNVP and Glow.
`experiment`: training on images, walks between classes, and MNIST.
"""
