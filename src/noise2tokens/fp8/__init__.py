"""FP8 mixed-precision training: eight bits a number in the products of matrices, and where more are needed.

codec.py        floating-point formats from their bits
scaling.py      one scale for many numbers: tensors, rows, tiles and blocks
gemm.py         a product of scaled matrices, with an accumulator as narrow as that of a tensor core
linear.py       a linear map whose three products are computed in FP8
experiment.py   what it costs in accuracy, measured
"""
