"""Kimi-VL: a vision-language model that sees pictures at their own resolution.

preprocess.py   from a picture of any size to patches and a grid; what a picture costs in tokens
moonvit.py      the encoder: packed pictures, an interpolated table and two-dimensional rotary positions, and the merge
projector.py    from merged patches to the language model's embeddings
model.py        all of it with chapter 15's decoder: mixed batches, generation, counts, released checkpoints
reading.py      handwritten digits on canvases of many sizes, with questions in text
experiment.py   a small one that learns to read them
"""
