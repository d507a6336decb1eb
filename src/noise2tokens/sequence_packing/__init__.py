"""Sequence packing and padding removal: no operation for tokens that are not there.

packers.py      who shares a row with whom: bin packing, with guarantees
layout.py       tokens end to end: offsets, positions, labels, masks, attention for each sequence by itself
stream.py       packed rows from several processes, with a state that can be saved
patch.py        a Hugging Face model that leaves padding out, for a while
experiment.py   what it is worth, measured
"""
