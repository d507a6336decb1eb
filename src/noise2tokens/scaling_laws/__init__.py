"""How large a model, how many tokens: power laws of compute, as DeepSeek LLM fitted them.

`flops` counts what a token costs; `fits` turns measured losses into laws with bands; `schedule` is the learning rate in
three steps; `experiment` trains small models to have losses to fit.
"""
