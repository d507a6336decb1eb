"""Multi-head latent attention: what a token leaves in the cache is a latent, from which keys and values are made.

`rope` has YaRN and the two orders of rotary coordinates, `attention` the layer in its two forms and its exchange with
transformers' checkpoints, `cost` what caches hold and what the forms compute, `experiment` the comparison on code.
"""
