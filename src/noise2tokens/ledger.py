"""Published numbers held against ours.

A `Ledger` row says what a paper reports, what this book measured or computed, and how far apart the two may be; the
verdict follows from the numbers and cannot be typed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from IPython.display import Markdown, display


@dataclass(frozen=True)
class Row:
    """One line of the ledger.

    Attributes:
        what: The quantity, with its unit.
        paper: The published value: a number where ours is to be compared with it, else words.
        derived: Whether the paper does not print that number, and its formula gives it.
        source: Where it is published: paper, and section, table or figure.
        ours: The value of this book (the mean over seeds, where there are several); None where there is none.
        spread: Half the range of our values over seeds; None where there are no seeds.
        tolerance: How far apart the two may be and still count as the same.
        why: Why they differ, or why the value is out of reach here.
        verdict: "reproduced", "differs", "not measured yet" or "out of reach", from the numbers.
    """

    what: str
    paper: float | int | str
    source: str
    ours: float | int | None
    tolerance: float | int | None
    why: str
    verdict: str
    derived: bool = False
    spread: float | None = None


class Ledger:
    """The rows of one chapter.

    Args:
        chapter: Name of the chapter's file without its ending, such as "02_nice".
    """

    def __init__(self, chapter: str):
        self.chapter = chapter
        self.rows: list[Row] = []

    def row(
        self,
        what: str,
        *,
        paper: float | int | str,
        source: str,
        ours: float | int | Sequence[float | int] | None = None,
        tolerance: float | int | None = None,
        why: str = "",
        derived: bool = False,
    ) -> Row:
        """Add a row; the verdict is computed.

        Args:
            what: The quantity, with its unit.
            paper: The published value.
            source: Paper, and section, table or figure.
            ours: Our value, or for what is trained the values of at least three seeds; None where there is none.
            tolerance: Largest distance that counts as reproduced, of every seed; needed with `ours`. Given without
                `ours`, the row says that the value is to come from a run that has not been made; left out too, the
                value is out of reach.
            why: The reason, needed where the values differ or ours is out of reach.
            derived: Whether the paper does not print that number, and its formula gives it.

        Returns:
            The row.

        Raises:
            TypeError: If a number is a truth value, or `ours` or the tolerance is no number.
            ValueError: If a source, a tolerance or a needed reason is missing, a number is not finite, the tolerance is
                negative or larger than the value itself, or there are fewer than three seeds.
        """
        if not what.strip() or not source.strip():
            raise ValueError(f"{what}: what is compared, or its source, is missing")
        spread = None
        if isinstance(ours, Sequence):
            if len(ours) < 3:
                raise ValueError(f"{what}: at least three seeds are needed, got {len(ours)}")
            values = list(ours)
        else:
            values = [] if ours is None else [ours]
        for name, number in [
            ("paper", paper),
            ("tolerance", tolerance),
            *(("ours", v) for v in values),
        ]:
            if isinstance(number, bool) or not isinstance(number, int | float | str | None):
                raise TypeError(f"{what}: {name} must be a number, got {number!r}")
            if isinstance(number, int | float) and not math.isfinite(number):
                raise ValueError(f"{what}: {name} must be finite, got {number}")
        if tolerance is not None and tolerance < 0:
            raise ValueError(f"{what}: the tolerance must not be negative, got {tolerance}")
        if not values:
            verdict = "out of reach" if tolerance is None else "not measured yet"
        else:
            if isinstance(paper, str) or tolerance is None:
                raise ValueError(
                    f"{what}: to compare, paper must be a number and a tolerance be given"
                )
            if tolerance > abs(paper) > 0:
                raise ValueError(f"{what}: a tolerance of {tolerance} says nothing about {paper}")
            if len(values) > 1:
                spread = (max(values) - min(values)) / 2
            ours = fmean(values) if spread is not None else values[0]
            near = all(abs(value - paper) <= tolerance for value in values)
            verdict = "reproduced" if near else "differs"
        if verdict in ("differs", "out of reach") and not why.strip():
            raise ValueError(f"{what}: the verdict is “{verdict}”, so say why")
        ours = ours if values else None
        self.rows.append(Row(what, paper, source, ours, tolerance, why, verdict, derived, spread))
        return self.rows[-1]

    def show(self) -> None:
        """Show the rows as a table; the book's ledger page collects them from the output's metadata."""
        display(
            Markdown(ledger_table(asdict(row) for row in self.rows)),
            metadata={"noise2tokens": {"ledger": [asdict(row) for row in self.rows]}},
        )


def ledger_table(rows: Iterable[dict[str, Any]]) -> str:
    """Lay out rows as a Markdown table.

    Args:
        rows: The fields of `Row`, as dictionaries.

    Returns:
        Markdown.
    """
    lines = ["| What | Paper | Here | Tolerance | Verdict | Source |", "|---|---|---|---|---|---|"]
    for row in rows:
        verdict = f"**{row['verdict']}**" + (f": {row['why']}" if row["why"] else "")
        cells = (
            row["what"],
            _number(row["paper"]) + (" (derived)" if row["derived"] else ""),
            _number(row["ours"], row["tolerance"])
            + ("" if row["spread"] is None else f" ± {row['spread']:.1g}"),
            "" if row["tolerance"] is None else f"± {row['tolerance']:g}",
            verdict,
            row["source"],
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _number(value: float | int | str | None, tolerance: float | int | None = None) -> str:
    """Write a number with one digit more than its tolerance resolves."""
    if value is None:
        return "–"
    if isinstance(value, str) or not tolerance:
        return f"{value:.7g}" if isinstance(value, int | float) else value
    return f"{value:.{max(0, 1 - math.floor(math.log10(tolerance)))}f}"
