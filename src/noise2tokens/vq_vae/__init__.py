"""An autoencoder whose code is a small picture of integers, and a model of that picture.

Quantizers (`quantizers`), the autoencoder with its likelihood (`autoencoder`), autoregressive models of code maps
(`priors`), and the chapter's experiments (`experiment`).
"""
