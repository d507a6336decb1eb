"""DeepSeek-V3, whole: the decoder that latent attention and mixtures of experts make, and what was built around it.

config.py       published sizes, of DeepSeek-V3 and its relatives
count.py        parameters, in all and for a token, and operations, in closed form
model.py        the assembly, and released checkpoints there and back
mtp.py          multi-token prediction: modules, loss, and decoding that drafts with them
pipeline.py     schedules of pipeline parallelism, simulated: 1F1B, ZB1P, DualPipe
parallel.py     training on several processes, sharded, with experts at home on one each; resumes where it was killed
experiment.py   a small one trained on code, with multi-token prediction and without
"""
