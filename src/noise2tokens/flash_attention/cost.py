"""What attention costs: operations, bytes moved, bytes held.

The closed forms count what the code in `tiled` does, term by term, so that a test can ask for equality and not for
resemblance. N is the number of queries and of keys, d the head dimension; batch and heads multiply everything.
"""

from collections.abc import Callable
from math import ceil

from torch.distributed._tools.mem_tracker import MemTracker


def attention_flops(
    batch: int, heads: int, length: int, dim: int, causal: bool, backward: bool = False
) -> float:
    """Floating-point operations of the matrix products of attention; the softmax is not counted.

    Args:
        batch, heads, length, dim: the shape of the queries.
        causal: half of the score matrix is needed.
        backward: count the backward pass, five products, instead of the forward pass, two.

    Returns:
        4 N^2 d for each head forward, halved if causal, times 2.5 for backward.

    Source: Dao 2023, section 4.1.
    """
    return (
        4 * length**2 * dim * batch * heads * (0.5 if causal else 1.0) * (2.5 if backward else 1.0)
    )


def plain_bytes(length: int, dim: int, itemsize: int, backward: bool = False) -> int:
    """Bytes that `plain_forward`, or `plain_backward`, moves for one head.

    Args:
        length: N, queries and keys.
        dim: d, the head dimension.
        itemsize: bytes of an element.
        backward: count the backward pass instead of the forward pass.

    Returns:
        Forward (4 N d + 4 N^2) elements: Q, K, V and O are moved once, S and P written and read. Backward
        (8 N d + 7 N^2): P is read twice, dP written and read, dS written and read twice.

    Source: counted from Dao et al. 2022, Algorithms 0 and 3; Theta(N d + N^2) in Theorem 2.
    """
    elements = 8 * length * dim + 7 * length**2 if backward else 4 * length * dim + 4 * length**2
    return elements * itemsize


def tiled_bytes(length: int, dim: int, itemsize: int, rows: int) -> int:
    """Bytes that `tiled_forward` moves for one head, without causal mask.

    Args:
        length: N, queries and keys.
        dim: d, the head dimension.
        itemsize: bytes of an element, at least 4 being used for LSE.
        rows: queries of a tile; K and V are read once for each block of so many queries.

    Returns:
        2 N d for Q and O and 2 N d ceil(N / rows) for K and V, in elements, and N for LSE, in bytes.

    Raises:
        ValueError: if a tile has no row.

    Source: counted from Dao 2023, Algorithm 1.
    """
    if rows < 1:
        raise ValueError(f"a tile has at least one row, got {rows}")
    return 2 * length * dim * (1 + ceil(length / rows)) * itemsize + length * max(itemsize, 4)


def tile_for(on_chip: int, dim: int) -> tuple[int, int]:
    """The tile (queries, keys) for which Q, O, K, V and S tiles together fit in the fast memory.

    With rows = M / (5 d) and columns = min(rows, d), Q and O take 2 M / 5, K and V at most 2 M / 5 and S at most
    M / 5 elements. So the rows grow in proportion to M / d, and `tiled_bytes` becomes 2 N d + 10 N^2 d^2 / M
    elements: less than the 4 N^2 of the plain way when M > 2.5 d^2.

    Args:
        on_chip: M, the size of the fast memory in elements.
        dim: d, the head dimension.

    Returns:
        Queries and keys of a tile.

    Raises:
        ValueError: if not even one query fits, or the dimension is not positive.

    Source: Dao et al. 2022, Algorithm 1, line 1, with constants that fit.
    """
    rows = on_chip // (5 * dim) if dim > 0 else 0
    if rows < 1:
        raise ValueError(
            f"a tile of head dimension {dim} needs {5 * dim} elements of fast memory, got {on_chip}"
        )
    return rows, min(rows, dim)


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest number of bytes that tensors made inside `run` held at one time.

    Args:
        run: a function without arguments; forward and backward are both tracked.

    Returns:
        Bytes at the peak. Tensors made before `run` are left out, except those that it takes a view of.

    Source: measured by torch.distributed._tools.mem_tracker.MemTracker.
    """
    tracker = MemTracker()
    with tracker:
        run()
    return max(
        (sum_of["Total"] for sum_of in tracker.get_tracker_snapshot("peak").values()), default=0
    )
