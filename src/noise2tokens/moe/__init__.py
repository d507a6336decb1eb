"""Mixture of experts in the manner of DeepSeek: many small experts, a few of them for each token, evenly loaded.

router.py       affinities, groups, the choice of experts and their weights
balancing.py    loads and how they are kept even: auxiliary losses, and a bias that no gradient sees
experts.py      the experts' computation: a loop, and one multiplication for all
layer.py        a feed-forward network for `transformer.Decoder`; transformers' names for its weights and back
parallel.py     experts on several processes: all-to-all there and back
cost.py         parameters, operations and messages, counted
experiment.py   strategies of balancing compared on text
"""
