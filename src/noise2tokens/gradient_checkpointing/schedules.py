"""Four ways to run a chain of layers backward, as lists of steps that can be counted, drawn and carried out.

Layer i turns x_i into x_{i+1}, i = 0 ... n-1, and its backward pass needs its input x_i. A schedule is a sequence of

    ("forward", i)    compute x_{i+1} from x_i, and keep it
    ("forget", i)     drop x_i
    ("backward", i)   turn the gradient of x_{i+1} into that of x_i

Time is the number of forward steps; every schedule makes n backward steps. Memory is the number of kept values. The
last one, x_n, is not counted: it becomes the loss.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb

import torch
from jaxtyping import Float
from torch import Tensor

Step = tuple[str, int]
Span = tuple[int, int]


@dataclass(frozen=True)
class Trace:
    """What a schedule did: its steps, the values kept after each, the most kept at once, and the forward steps made."""

    steps: list[Step]
    kept: list[frozenset[int]]
    peak: int
    forwards: int


def keep_all(n: int) -> Iterator[Step]:
    """Keep every layer's input: n values, n forward steps."""
    yield from _forward(0, n)
    yield ("forget", n)
    yield from _backward(0, n)


def keep_none(n: int) -> Iterator[Step]:
    """Keep x_0 alone and start from there for every layer: O(1) values, n (n + 1) / 2 forward steps."""
    yield from _walk(0, n)
    yield ("forget", n)
    for i in reversed(range(n)):
        yield from _walk(0, i)
        yield ("backward", i)
        yield ("forget", i)


def in_segments(spans: Sequence[Span]) -> Iterator[Step]:
    """Keep the first value of each segment, and recompute a segment as a whole when its turn comes.

    Args:
        spans: (start, stop) of each segment, in order, without gaps.

    Raises:
        ValueError: If there is no segment.
    """
    if not spans:
        raise ValueError("need at least one segment, got none")
    for start, stop in spans:
        yield from _walk(start, stop)
    yield ("forget", spans[-1][1])
    for start, stop in reversed(spans):
        yield from _forward(start, stop - 1)
        yield from _backward(start, stop)


def recursively(
    n: int, split: Callable[[int, int], int] = lambda length, depth: length // 2
) -> Iterator[Step]:
    """Walk to a point in between, deal with what is behind it, then with what is before it.

    Args:
        n: Number of layers.
        split: Where to put the point, as a number of layers from 1 to length - 1, given the length and how many points
            are kept already; in the middle by default.

    Source: halving as in Chen et al. 2016, section 4.4; other splits as in Griewank & Walther 2000.
    """
    yield from _between(0, n, n, split, 0)


def _between(
    start: int, stop: int, n: int, split: Callable[[int, int], int], depth: int
) -> Iterator[Step]:
    if stop - start == 1:
        if stop == n:
            yield from (("forward", start), ("forget", n))
        yield ("backward", start)
        return
    middle = start + split(stop - start, depth)
    if not start < middle < stop:
        raise ValueError(f"cannot split {stop - start} layers after {middle - start}")
    yield from _walk(start, middle)
    yield from _between(middle, stop, n, split, depth + 1)
    yield ("forget", middle)
    yield from _between(start, middle, n, split, depth)


def _forward(start: int, stop: int) -> Iterator[Step]:
    yield from (("forward", i) for i in range(start, stop))


def _walk(start: int, stop: int) -> Iterator[Step]:
    """Go from x_start to x_stop, keeping these two."""
    for i in range(start, stop):
        yield ("forward", i)
        if i > start:
            yield ("forget", i)


def _backward(start: int, stop: int) -> Iterator[Step]:
    for i in reversed(range(start, stop)):
        yield ("backward", i)
        yield ("forget", i)


def trace(schedule: Iterator[Step] | Sequence[Step], n: int) -> Trace:
    """Count what a schedule keeps and computes.

    Args:
        schedule: Steps for n layers; x_0 is kept at the start.
        n: Number of layers.

    Raises:
        ValueError: If there is no layer, a step needs a value that is not kept, or backward steps are missing or out
            of order.
    """
    if n < 1:
        raise ValueError(f"need at least 1 layer, got {n}")
    kept, next_back, forwards, after = {0}, n - 1, 0, []
    steps = list(schedule)
    for kind, i in steps:
        if kind not in ("forward", "backward", "forget") or i not in kept:
            raise ValueError(f"step ({kind!r}, {i}) cannot be done with {sorted(kept)} kept")
        if kind == "backward":
            if i != next_back:
                raise ValueError(f"layer {next_back} comes next on the way back, got {i}")
            next_back -= 1
        elif kind == "forget":
            kept.discard(i)
        else:
            kept.add(i + 1)
            forwards += 1
        after.append(frozenset(kept - {n}))
    if next_back >= 0:
        raise ValueError(f"the backward steps of layers 0 to {next_back} are missing")
    return Trace(steps, after, max(map(len, after)), forwards)


def carry_out(
    schedule: Iterator[Step] | Sequence[Step],
    layers: Sequence[Callable[[Tensor], Tensor]],
    x: Float[Tensor, "*shape"],
    loss: Callable[[Tensor], Float[Tensor, ""]],
) -> Float[Tensor, "*shape"]:
    """Follow a schedule with real layers; the parameters' gradients are added to their `.grad`, as by backward().

    Args:
        schedule: Steps, as `trace` accepts them.
        layers: The chain.
        x: x_0.
        loss: Of x_n.

    Returns:
        The gradient of the loss with respect to x_0.
    """
    values, grad = {0: x.detach()}, None
    for kind, i in schedule:
        if kind == "forget":
            if i == len(layers) and grad is None:
                end = values[i].requires_grad_()
                (grad,) = torch.autograd.grad(loss(end), end)
            del values[i]
        elif kind == "forward":
            with torch.no_grad():
                values[i + 1] = layers[i](values[i])
        else:
            start = values[i].detach().requires_grad_()
            layers[i](start).backward(grad)
            grad = start.grad
    return grad


def equal_spans(n: int, segments: int) -> list[Span]:
    """Cut n layers into segments whose lengths differ by at most one, the longer ones first.

    Raises:
        ValueError: If there is not at least one layer for each segment.
    """
    if not 1 <= segments <= n:
        raise ValueError(f"need 1 to {n} segments for {n} layers, got {segments}")
    short, longer = divmod(n, segments)
    cuts = [i * short + min(i, longer) for i in range(segments + 1)]
    return list(zip(cuts, cuts[1:], strict=False))


@dataclass(frozen=True)
class Segment:
    """Layers start to stop - 1: recomputed as a whole from the first one's input, or kept as they are."""

    start: int
    stop: int
    recompute: bool


def check_cover(segments: Sequence[Segment], n: int) -> None:
    """Raise ValueError unless the segments cover n layers in order, without gaps."""
    ends = [0, *(segment.stop for segment in segments)]
    if [segment.start for segment in segments] != ends[:-1] or ends[-1] != n:
        raise ValueError(f"segments must cover {n} layers in order, got {segments}")


def peak_of(
    segments: Sequence[Segment], sizes: Sequence[int], inputs: Sequence[int] | None = None
) -> int:
    """The most that is kept at once with these segments; `sizes` and `inputs` as for `optimal_segments`.

    A recomputed segment keeps its input from the forward pass on, and what all of its layers keep while its turn lasts.
    Then the segments behind it are gone: only those before it count. A value that a walk passes is not counted.

    Raises:
        ValueError: If the segments leave a gap or layers over.
    """
    check_cover(segments, len(sizes))
    inputs = sizes if inputs is None else inputs
    before, peak = 0, 0
    for segment in segments:
        inside = sum(sizes[segment.start : segment.stop])
        peak = max(peak, before + inside)
        before += inputs[segment.start] if segment.recompute else inside
    return max(peak, before)


def optimal_segments(
    costs: Sequence[float | int],
    sizes: Sequence[int],
    budget: int,
    inputs: Sequence[int] | None = None,
) -> list[Segment]:
    """Find segments that fit into a budget and recompute as little as possible.

    Args:
        costs: Time of each layer's forward pass.
        sizes: What each layer keeps for its backward pass, its input included.
        budget: The most that may be kept at once, in the unit of `sizes`.
        inputs: Size of each layer's input; as `sizes` where left out, for layers that keep nothing else.

    Returns:
        Segments in order; single layers where they are kept.

    Raises:
        ValueError: If the lists do not fit together, a number is negative, an input is larger than what its layer
            keeps, or nothing fits into the budget.

    Source: dynamic programming over the pairs (kept so far, recomputed so far) of which neither is dominated.
    """
    inputs = sizes if inputs is None else inputs
    n = len(costs)
    if not 0 < n == len(sizes) == len(inputs) or min([*costs, *inputs]) < 0:
        raise ValueError(
            f"need sizes and inputs for each of {n} layers, none negative, got {sizes} and {inputs}"
        )
    if any(whole < part for whole, part in zip(sizes, inputs, strict=True)):
        raise ValueError(f"a layer keeps its input at least, got {sizes} with inputs {inputs}")
    # best[i]: for the first i layers, what can be kept and what it costs, with the segments that lead there.
    best: list[dict[int, tuple[float, list[Segment]]]] = [{0: (0.0, [])}] + [{} for _ in range(n)]
    for i in range(n):
        for kept, (time, path) in _undominated(best[i]):
            steps = [(Segment(i, i + 1, False), sizes[i], 0.0)]
            steps += [
                (Segment(i, j, True), inputs[i], sum(costs[i:j])) for j in range(i + 1, n + 1)
            ]
            for segment, grows, takes in steps:
                if kept + sum(sizes[i : segment.stop]) > budget:
                    break
                now, found = (time + takes, [*path, segment]), best[segment.stop]
                if kept + grows not in found or now[0] < found[kept + grows][0]:
                    found[kept + grows] = now
    if not best[n]:
        raise ValueError(f"no way to cut {n} layers fits into a budget of {budget}")
    return min(best[n].values(), key=lambda found: found[0])[1]


def _undominated(found: dict[int, tuple[float, list[Segment]]]) -> list:
    """Of pairs (kept, time), leave those that no pair with as little kept beats or equals in time."""
    left, least = [], float("inf")
    for kept, (time, path) in sorted(found.items(), key=lambda item: (item[0], item[1][0])):
        if time < least:
            left.append((kept, (time, path)))
            least = time
    return left


def smallest_budget(sizes: Sequence[int]) -> int:
    """The least memory with which each layer is recomputed at most once, by bisection over `optimal_segments`.

    Raises:
        ValueError: If there is no layer, or a size is negative.
    """
    if not sizes or min(sizes) < 0:
        raise ValueError(f"need sizes of at least one layer, none negative, got {sizes}")
    low, high = max(sizes) - 1, sum(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            optimal_segments([1] * len(sizes), sizes, middle)
            high = middle
        except ValueError:
            low = middle
    return high


def _check(n: int, slots: int) -> None:
    if n < 1 or slots < 0:
        raise ValueError(f"need at least 1 layer and 0 slots, got {n} and {slots}")


@cache
def fewest_forwards(n: int, slots: int) -> int:
    """The fewest forward steps that serve n layers backward with x_0 and a number of further values kept.

    Args:
        n: Number of layers, at least 1.
        slots: Values that may be kept beside x_0, from 0 on; the two of a walk under way are not counted.

    Returns:
        Forward steps, the last layer's own not counted: it is done with the loss.

    Raises:
        ValueError: If there is no layer, or slots are negative.

    Source: the recursion behind Griewank & Walther 2000, section 2.
    """
    _check(n, slots)
    if n == 1:
        return 0
    if slots == 0:
        return n * (n - 1) // 2
    return min(
        m + fewest_forwards(n - m, slots - 1) + fewest_forwards(m, slots) for m in range(1, n)
    )


def binomial_split(slots: int) -> Callable[[int, int], int]:
    """A split for `recursively` that keeps at most so many points beside x_0, and makes the fewest forward steps."""

    def split(length: int, depth: int) -> int:
        left = slots - depth
        if left == 0:
            return length - 1
        return min(
            range(1, length),
            key=lambda m: m + fewest_forwards(length - m, left - 1) + fewest_forwards(m, left),
        )

    return split


def binomial_forwards(n: int, slots: int) -> int:
    """`fewest_forwards` in closed form: r n - C(c + r, c + 1), with c = slots + 1 and the least r that reaches n.

    With r forward steps for each layer, C(c + r, c) layers are in reach.

    Raises:
        ValueError: As `fewest_forwards`.

    Source: Griewank & Walther 2000, proposition 1, with x_0 as one of their checkpoints.
    """
    _check(n, slots)
    c = slots + 1
    r = 0
    while comb(c + r, c) < n:
        r += 1
    return r * n - comb(c + r, c + 1)
