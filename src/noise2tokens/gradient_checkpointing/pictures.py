"""The chain drawn while a schedule runs, and memory over the operations of a training step."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from noise2tokens.display import COLORS, INK
from noise2tokens.gradient_checkpointing.schedules import Trace

State = tuple[str, int, frozenset[int]]


def states(found: Trace) -> list[State]:
    """Leave the steps that compute: kind, layer, and what is kept during the step, before anything is dropped."""
    pairs = zip(found.steps, found.kept, strict=True)
    return [(kind, i, kept) for (kind, i), kept in pairs if kind != "forget"]


def draw_chains(figure: Figure, chains: dict[str, Sequence[State]], n: int, clock: int) -> None:
    """Draw what each schedule keeps at a time, and what it computes.

    Args:
        figure: Empty.
        chains: From `states`, by name.
        n: Number of layers.
        clock: Step to draw, from 0; a schedule that has ended stays as it was.
    """
    ax = figure.subplots()
    for row, (name, steps) in enumerate(chains.items()):
        y, done = -row, steps[: clock + 1]
        kind, layer, kept = done[-1]
        running = clock < len(steps)
        at = layer + 1 if kind == "forward" else layer
        color = COLORS[2] if kind == "forward" else COLORS[1]
        ax.hlines([y] * n, *zip(*((i + 0.22, i + 0.78) for i in range(n)), strict=True), color=INK)
        filled = [COLORS[0] if i in kept and running else "none" for i in range(n + 1)]
        ax.scatter(range(n + 1), [y] * (n + 1), s=110, zorder=2, color=filled, edgecolors=INK)
        if running:
            ax.scatter(at, y, s=210, zorder=3, color="none", edgecolors=color, linewidths=2.5)
        most = max(len(state[2]) for state in done)
        counts = [sum(step[0] == which for step in done) for which in ("forward", "backward")]
        text = f"kept {len(kept) if running else 0}, at most {most}"
        ax.text(n + 0.7, y + 0.13, text, fontsize="small", va="center")
        words = f"{counts[0]} forward, {counts[1]} back" + ("" if running else ": done")
        ax.text(n + 0.7, y - 0.2, words, fontsize="small", va="center")
        ax.text(-0.7, y, name, fontsize="small", va="center", ha="right")
    ax.set(xlim=(-3.2, n + 5), ylim=(-len(chains) + 0.4, 0.6))
    ax.set_axis_off()
