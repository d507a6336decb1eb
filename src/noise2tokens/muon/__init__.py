"""Muon: momentum whose singular values are set to one, for the matrices of hidden layers.

orthogonalize.py   the polar factor of a matrix, by SVD and by products of matrices alone (Newton-Schulz)
optimizer.py       one optimizer for a whole model: Muon by Moonlight's rules for matrices, AdamW for the rest
cost.py            what the orthogonalization costs beside the training of a layer
experiment.py      both optimizers at equal budgets, learning rates swept; laws of loss over compute
"""
