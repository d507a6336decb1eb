"""Samples that fall into bins, drawn."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from noise2tokens.display import COLORS, INK
from noise2tokens.sequence_packing.packers import Packer


def falls(packer: Packer, lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """Where each length goes, in the order in which an online packer places them: bin and position in `lengths`."""
    bins = packer(lengths, capacity)
    place = {i: number for number, places in enumerate(bins) for i in places}
    return [(place[i], i) for i in range(len(lengths))]


def draw_bins(
    figure: Figure,
    ways: dict[str, list[tuple[int, int]]],
    lengths: Sequence[int],
    capacity: int,
    done: int,
) -> None:
    """Draw the bins of several packers after some samples have been placed.

    Args:
        figure: Empty.
        ways: From `falls`, by name; of a decreasing packer with the lengths in its own order.
        lengths: Of the samples, in the order of `falls`.
        capacity: Of a bin.
        done: Samples placed.
    """
    most = max(max(number for number, _ in way) for way in ways.values()) + 1
    axes = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for ax, (name, way) in zip(axes, ways.items(), strict=True):
        full = [0] * most
        for step, (number, i) in enumerate(way[:done]):
            color = COLORS[1] if step == done - 1 else COLORS[0]
            ax.bar(
                number, lengths[i], bottom=full[number], color=color, edgecolor="white", width=0.9
            )
            full[number] += lengths[i]
        used = sum(room > 0 for room in full)
        share = sum(full) / max(1, used * capacity)
        ax.axhline(capacity, color=INK, linestyle="--", linewidth=1)
        ax.set(xlim=(-0.6, most - 0.4), ylim=(0, capacity * 1.08), xlabel="bin")
        ax.set_title(f"{name}: {used} bins, {share:.0%} full", fontsize="small")
    axes[0].set_ylabel("tokens")
