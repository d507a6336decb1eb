"""What the chapter draws and is too long for its cells: tiles that sweep over the scores, and measured speed."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from noise2tokens.display import COLORS, INK
from noise2tokens.flash_attention.softmax import SoftmaxState, finish
from noise2tokens.flash_attention.tiled import SlowMemory, causal_mask, sweep, tile_spans


class Frame(NamedTuple):
    """One moment of a tiled causal attention with one head."""

    rows: tuple[int, int]  # the block of queries in fast memory
    columns: tuple[int, int]  # the tile of keys merged last; empty at the start
    before: SoftmaxState
    after: SoftmaxState
    output: Float[Tensor, "query value_dim"]  # nan where not yet written


def sweep_frames(
    q: Float[Tensor, "query dim"],
    k: Float[Tensor, "key dim"],
    v: Float[Tensor, "key value_dim"],
    scale: float,
    tile: int,
) -> list[Frame]:
    """Run causal attention with square tiles and keep the state after each.

    Args:
        q, k, v: queries, keys and values of one head.
        scale: what the scores are multiplied by.
        tile: queries and keys of a tile.

    Returns:
        The frames, in the order of the computation; the output fills up block by block.
    """
    output = torch.full((len(q), v.shape[-1]), torch.nan)
    frames = []
    for rows in tile_spans(len(q), tile):
        q_tile = q[None, None, None, slice(*rows)]
        offset = len(k) - len(q)
        states = sweep(
            q_tile,
            k[None, None, None],
            v[None, None, None],
            rows,
            offset,
            scale,
            SlowMemory(),
            tile,
        )
        (_, before) = next(states)
        for columns, after in states:
            last = columns[1] >= min(rows[1] + offset, len(k))
            if last:
                output[slice(*rows)] = finish(after)[0][0, 0, 0]
            frames.append(Frame(rows, columns, before, after, output.clone()))
            before = after
    return frames


def caption(frame: Frame) -> str:
    """The frame in two or three sentences."""
    rows, columns = frame.rows, frame.columns
    text = f"Queries {rows[0] + 1} to {rows[1]} meet keys {columns[0] + 1} to {columns[1]}. "
    grown = int((frame.after.m > frame.before.m).sum())
    if columns[0] == 0:
        text += "The state was empty; this tile makes it. "
    elif grown == 0:
        text += "No maximum grew: the old state stays as it is, and the tile adds to it. "
    else:
        text += (
            f"The maximum grew in {grown} of {rows[1] - rows[0]} rows: what they had shrinks by "
            "exp(m before − m now), and the tile adds to it. "
        )
    if not frame.output[slice(*rows)].isnan().any():
        text += "It was the last tile of these rows: o is divided by ℓ and written."
    return text


def draw_sweep(
    frame: Frame, scores: Float[Tensor, "query key"], figure: Figure, scale_of_o: float
) -> None:
    """Draw one frame: the score matrix with the tile that is in fast memory, the state, and the output so far.

    Args:
        frame: what to draw.
        scores: all scaled scores; those outside the tile are drawn only as places.
        figure: an empty figure.
        scale_of_o: the largest magnitude of the output, for one color scale in all frames.
    """
    grid = figure.add_gridspec(1, 5, width_ratios=[4, 1.4, 1.4, 1.4, 1.4])
    matrix, m_axes, ell_axes, o_axes, output_axes = (figure.add_subplot(cell) for cell in grid)
    _draw_tiles(matrix, frame, scores)
    labels = [str(i + 1) for i in range(*frame.rows)]
    before, after = (SoftmaxState(*(x[0, 0, 0] for x in state)) for state in frame[2:4])
    reach = float(scores.abs().max())
    m_axes.barh(labels, after.m.numpy(), color=COLORS[1])
    m_axes.plot(before.m.numpy(), labels, "|", color=INK, markersize=22, markeredgewidth=2)
    m_axes.axvline(0, color=INK, linewidth=0.8)
    m_axes.set(title="$m$", xlim=(-reach, reach), xticks=[0])
    kept = before.ell * torch.exp(before.m - after.m)
    ell_axes.barh(labels, kept.numpy(), color=COLORS[0])
    ell_axes.barh(labels, (after.ell - kept).numpy(), left=kept.numpy(), color=COLORS[1])
    ell_axes.set(title=r"$\ell$", xlim=(0, 6), xticks=[0, 5])
    for axes in (m_axes, ell_axes):
        axes.invert_yaxis()
    o_axes.imshow(
        after.o.numpy(), cmap="RdBu_r", vmin=-3 * scale_of_o, vmax=3 * scale_of_o, aspect="auto"
    )
    o_axes.set(title="$o$", xticks=[], yticks=range(len(labels)), yticklabels=labels)
    output_axes.imshow(
        frame.output.numpy(), cmap="RdBu_r", vmin=-scale_of_o, vmax=scale_of_o, aspect="auto"
    )
    output_axes.set(title="$O$", xticks=[], yticks=[])


def _draw_tiles(axes: Axes, frame: Frame, scores: Tensor) -> None:
    """The score matrix: the tile in fast memory in color, finished ones hatched, hidden ones empty."""
    seen = torch.full_like(scores, torch.nan)
    tile = slice(*frame.rows), slice(*frame.columns)
    seen[tile] = scores.masked_fill(~causal_mask(*scores.shape), torch.nan)[tile]
    low, high = float(scores.min()), float(scores.max())
    axes.imshow(seen.numpy(), cmap="viridis", vmin=low, vmax=high)
    size = frame.rows[1] - frame.rows[0]
    queries, keys = scores.shape
    for top in range(0, queries, size):
        for left in range(0, top + size + keys - queries, size):
            done = (top, left) < (frame.rows[0], frame.columns[0])
            style = dict(hatch="///", alpha=0.35) if done else dict(alpha=0.8)
            if (top, left) == (frame.rows[0], frame.columns[0]):
                style = dict(edgecolor=COLORS[1], linewidth=2.5)
            axes.add_patch(
                Rectangle(
                    (left - 0.5, top - 0.5), size, size, fill=False, **{"edgecolor": INK, **style}
                )
            )
    axes.set(xlabel="key", ylabel="query", title="scores", xticks=[], yticks=[])


def draw_speed(rows: list[dict[str, Any]], dim: int, figure: Figure) -> None:
    """Draw what `experiment.speed` measured for one head dimension.

    Args:
        rows: its rows.
        dim: the head dimension to draw.
        figure: an empty figure; gets four panels, forward and backward by without and with causal mask.
    """
    panels = figure.subplots(1, 4, sharey=True)
    cases = [(pass_, causal) for pass_ in ("forward", "backward") for causal in (False, True)]
    for axes, (pass_, causal) in zip(panels, cases, strict=True):
        backends = dict.fromkeys(row["backend"] for row in rows)
        for color, backend in zip(COLORS, backends, strict=False):
            points = [
                (row["length"], row[pass_])
                for row in rows
                if (row["backend"], row["dim"], row["causal"]) == (backend, dim, causal)
                and pass_ in row
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True), "o-", color=color, label=backend, markersize=4
                )
        axes.set(
            xscale="log",
            xlabel="length",
            title=f"{pass_}{', causal' if causal else ''}",
            ylim=(0, None),
        )
    panels[0].set_ylabel("TFLOP/s")
    panels[0].legend(fontsize="small")
