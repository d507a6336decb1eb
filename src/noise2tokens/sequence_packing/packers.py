"""Bin packing of sequences: who shares a row of so many tokens with whom.

A packer takes lengths and a capacity, and returns bins: lists of positions whose lengths add up to the capacity at
most. Online packers decide for each length as it comes; the decreasing ones want to see all first.

    next_fit                        one open bin                  at most twice the fewest bins
    first_fit, best_fit             all bins stay open            at most 1.7 times
    first_fit_decreasing            longest first                 at most 11/9 times and 2/3 of a bin
    best_fit_decreasing             longest first                 at most 11/9 times and 4 bins
"""

from collections.abc import Callable, Sequence

import numpy as np

Bins = list[list[int]]
Packer = Callable[[Sequence[int], int], Bins]
BLOCK = 512


def next_fit(lengths: Sequence[int], capacity: int) -> Bins:
    """Fill one bin; when a length does not fit, close it and open the next.

    Args:
        lengths: Each from 1 to the capacity.
        capacity: Of a bin.

    Returns:
        Positions by bin, in order.

    Raises:
        ValueError: If a length is outside its range.
        TypeError: If a length or the capacity is not an int of Python.

    Source: Johnson 1973; what a buffer that is flushed when it is full does.
    """
    _check(lengths, capacity)
    bins: Bins = []
    left = 0
    for i, length in enumerate(lengths):
        if length > left:
            bins.append([])
            left = capacity
        bins[-1].append(i)
        left -= length
    return bins


def first_fit_slowly(lengths: Sequence[int], capacity: int) -> Bins:
    """`first_fit` by looking at one bin after another; the reference."""
    _check(lengths, capacity)
    bins: Bins = []
    left: list[int] = []
    for i, length in enumerate(lengths):
        fitting = next((b for b, room in enumerate(left) if room >= length), None)
        if fitting is None:
            fitting = len(bins)
            bins.append([])
            left.append(capacity)
        bins[fitting].append(i)
        left[fitting] -= length
    return bins


def first_fit(lengths: Sequence[int], capacity: int) -> Bins:
    """Put each length into the first bin that has room.

    Bins lie in blocks of which the largest room is known, so that most of them are never looked at.

    Args, Returns, Raises: as for `next_fit`.

    Source: Johnson et al. 1974; at most 1.7 times the fewest bins, Dósa & Sgall 2013.
    """
    _check(lengths, capacity)
    blocks = -(-max(1, len(lengths)) // BLOCK)
    left = np.full((blocks, BLOCK), capacity, dtype=np.int64)
    room = np.full(blocks, capacity, dtype=np.int64)
    bins: Bins = []
    first = 0  # blocks before it are full for the shortest length
    shortest = min(lengths, default=1)
    for i, length in enumerate(lengths):
        while room[first] < shortest:
            first += 1
        block = first + int((room[first:] >= length).argmax())
        row = left[block]
        place = int((row >= length).argmax())
        number = block * BLOCK + place
        if number == len(bins):
            bins.append([])
        bins[number].append(i)
        row[place] -= length
        room[block] = row.max()
    return bins


def best_fit_slowly(lengths: Sequence[int], capacity: int) -> Bins:
    """`best_fit` by looking at every bin; the reference. Of equally full bins the one filled last is taken."""
    _check(lengths, capacity)
    bins: Bins = []
    left: list[int] = []
    touched: list[int] = []
    for i, length in enumerate(lengths):
        fitting = [b for b, room in enumerate(left) if room >= length]
        if fitting:
            best = min(fitting, key=lambda b: (left[b], -touched[b]))
        else:
            best = len(bins)
            bins.append([])
            left.append(capacity)
            touched.append(0)
        bins[best].append(i)
        left[best] -= length
        touched[best] = i + 1
    return bins


def best_fit(lengths: Sequence[int], capacity: int) -> Bins:
    """Put each length into the fullest bin that has room.

    Bins are sorted by room into as many piles as there are rooms, and the piles that are not empty are the bits of one
    integer: the lowest bit from the length on names the bin.

    Args, Returns, Raises: as for `next_fit`.

    Source: Johnson et al. 1974; at most 1.7 times the fewest bins, Dósa & Sgall 2014.
    """
    _check(lengths, capacity)
    bins: Bins = []
    piles: list[list[int]] = [[] for _ in range(capacity + 1)]
    some = 0
    for i, length in enumerate(lengths):
        above = some >> length
        if above:
            room = length + (above & -above).bit_length() - 1
            number = piles[room].pop()
            if not piles[room]:
                some ^= 1 << room
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(i)
        room -= length
        if room:
            piles[room].append(number)
            some |= 1 << room
    return bins


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> Bins:
    """`first_fit`, the longest first.

    Source: Johnson 1973; at most 11/9 of the fewest bins and 2/3 of one, Dósa 2007.
    """
    return _longest_first(first_fit, lengths, capacity)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> Bins:
    """`best_fit`, the longest first.

    Source: Johnson et al. 1974, who outline a proof of at most 11/9 of the fewest bins and four; the constant 2/3 of
    `first_fit_decreasing` is not proven for it.
    """
    return _longest_first(best_fit, lengths, capacity)


def _longest_first(packer: Packer, lengths: Sequence[int], capacity: int) -> Bins:
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    return [[order[i] for i in places] for places in packer([lengths[i] for i in order], capacity)]


PACKERS: dict[str, Packer] = {
    "next fit": next_fit,
    "first fit": first_fit,
    "best fit": best_fit,
    "first fit, decreasing": first_fit_decreasing,
    "best fit, decreasing": best_fit_decreasing,
}


def fewest_bins(lengths: Sequence[int], capacity: int) -> int:
    """The optimum, by dynamic programming over all subsets; for at most 16 lengths.

    Raises:
        ValueError: If there are more, or as for `next_fit`.
    """
    _check(lengths, capacity)
    if len(lengths) > 16:
        raise ValueError(f"2^n subsets are looked at: need at most 16 lengths, got {len(lengths)}")
    best = [(0, capacity)] + [(len(lengths), capacity)] * (2 ** len(lengths) - 1)
    for subset in range(1, len(best)):
        for i, length in enumerate(lengths):
            if subset >> i & 1:
                bins, full = best[subset ^ (1 << i)]
                found = (bins, full + length) if full + length <= capacity else (bins + 1, length)
                best[subset] = min(best[subset], found)
    return best[-1][0]


def efficiency(lengths: Sequence[int], bins: Bins, capacity: int) -> float:
    """The share of places in the bins that hold a token.

    Raises:
        ValueError: If the bins do not hold every position once, or more than the capacity.
    """
    if sorted(i for places in bins for i in places) != list(range(len(lengths))):
        raise ValueError(f"the bins do not hold each of {len(lengths)} sequences once")
    fullest = max((sum(lengths[i] for i in places) for places in bins), default=0)
    if not bins or fullest > capacity:
        raise ValueError(
            f"need bins of at most {capacity} tokens, got {len(bins)}, up to {fullest}"
        )
    return sum(lengths) / (len(bins) * capacity)


def padded_efficiency(lengths: Sequence[int], batch: int, power: int = 1) -> float:
    """The share of places that hold a token where batches are padded to their longest sequence.

    Args:
        lengths: In the order in which batches are taken.
        batch: Sequences a batch; the last one may be smaller.
        power: 1 for the share of tokens, 2 for that of squared lengths, which attention computes.

    Raises:
        ValueError: If there is no sequence, or `batch` or `power` is below 1.
    """
    if not len(lengths) or batch < 1 or power < 1:
        raise ValueError(
            f"need sequences, batch >= 1 and power >= 1, got {len(lengths)}, {batch} and {power}"
        )
    parts = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    real = sum(length**power for length in lengths)
    return real / sum(max(part) ** power * len(part) for part in parts)


def sorted_in_pools(lengths: Sequence[int], pool: int) -> list[int]:
    """Positions in an order that is sorted by length within each pool of so many sequences, and otherwise unchanged.

    Batches are then cut from it: "length grouping" or "bucketing".

    Raises:
        ValueError: If `pool` is below 1.
    """
    if pool < 1:
        raise ValueError(f"need pool >= 1, got {pool}")
    starts = range(0, len(lengths), pool)
    pools = [range(start, min(start + pool, len(lengths))) for start in starts]
    return [i for one in pools for i in sorted(one, key=lambda i: lengths[i])]


def _check(lengths: Sequence[int], capacity: int) -> None:
    other = {type(n).__name__ for n in (capacity, *lengths) if not isinstance(n, int)}
    if other:  # NumPy's integers overflow where `best_fit` shifts bits
        raise TypeError(f"lengths and capacity must be int, got {sorted(other)}: use .tolist()")
    if len(lengths) and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(
            f"lengths must be 1 to {capacity}, got {min(lengths)} to {max(lengths)}: split or drop what is too long"
        )
