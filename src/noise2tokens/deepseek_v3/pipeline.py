"""Schedules of pipeline parallelism, simulated: who works when, who waits, and what has to be remembered meanwhile.

A model is cut into P stages, one a rank, and a batch into micro-batches. A schedule says for each rank in which order
it works; when it works follows, since each piece waits for the pieces that it depends on. Messages take no time.

    F forward of one micro-batch through one stage   B its whole backward   F&B one of each, done together
    W the part of B that makes gradients of weights   b the rest of B, which the stage before waits for; b + W = B

    run = simulate(dualpipe(8, 20), Durations(forward=1, backward=2, weights=1, both=2.6))
    run.bubbles, run.peaks, run.spans
"""

from dataclasses import dataclass, field
from typing import NamedTuple


class Piece(NamedTuple):
    """Part of a rank's work: "F", "B", "b" or "W" of a micro-batch that enters at the first (0) or last (1) rank."""

    kind: str
    batch: int
    direction: int = 0


Step = tuple[Piece, ...]  # one piece, or a forward and a backward one that are done together
Schedule = list[list[Step]]  # the steps of each rank, in their order


@dataclass(frozen=True)
class Durations:
    """How long each kind of step takes, in any unit; `both` is F&B, the sum of F and B if not given."""

    forward: float | int = 1
    backward: float | int = 2
    weights: float | int = 1
    both: float | int | None = None

    def __post_init__(self):
        if self.both is None:
            object.__setattr__(self, "both", self.forward + self.backward)
        if not (self.forward > 0 and 0 < self.weights < self.backward and self.both > 0):
            raise ValueError(f"need forward, both > 0 and backward > weights > 0, got {self}")

    def of(self, step: Step) -> float | int:
        """Return the duration of a step."""
        if len(step) == 2:
            return self.both
        alone = {"F": self.forward, "B": self.backward, "W": self.weights}
        alone["b"] = self.backward - self.weights
        return alone[step[0].kind]


class Span(NamedTuple):
    """A step with the time at which it starts and ends."""

    start: float | int
    end: float | int
    step: Step


@dataclass(frozen=True)
class Run:
    """What a simulation gives.

    Attributes:
        spans: For each rank its steps, in their order.
    """

    spans: list[list[Span]] = field(repr=False)

    @property
    def end(self) -> float | int:
        """When the last rank has done its work."""
        return max(rank[-1].end for rank in self.spans)

    @property
    def bubbles(self) -> list[float | int]:
        """For each rank, how long it does nothing from the first rank's start to the last one's end."""
        return [self.end - sum(span.end - span.start for span in rank) for rank in self.spans]

    @property
    def peaks(self) -> list[int]:
        """For each rank, the most micro-batches whose activations it holds: from F until W, or until the whole of B."""
        found = []
        for rank in self.spans:
            held = peak = 0
            for span in rank:
                held += sum(piece.kind == "F" for piece in span.step)
                peak = max(peak, held)
                held -= sum(piece.kind in "BW" for piece in span.step)
            found.append(peak)
        return found


def depends_on(piece: Piece, rank: int, ranks: int) -> list[tuple[Piece, int]]:
    """List what a piece of a rank's work waits for, and on which rank.

    Forward waits for the stage before, backward for its own forward and for the stage after, W for its own b. A whole
    backward counts as b here, since nobody but the rank itself waits for its W.
    """
    onwards = 1 if piece.direction == 0 else -1
    same = {"batch": piece.batch, "direction": piece.direction}
    if piece.kind == "W":
        return [(Piece("b", **same), rank)]
    if piece.kind == "F":
        need = [(Piece("F", **same), rank - onwards)]
    else:
        need = [(Piece("F", **same), rank), (Piece("b", **same), rank + onwards)]
    return [(what, where) for what, where in need if 0 <= where < ranks]


def simulate(schedule: Schedule, durations: Durations) -> Run:
    """Let each rank start each step as soon as it has done the one before, and all that the step waits for is done.

    Raises:
        ValueError: If ranks wait for one another for ever.
    """
    ranks = len(schedule)
    done: dict[tuple[Piece, int], float | int] = {}
    spans: list[list[Span]] = [[] for _ in schedule]
    while any(len(spans[rank]) < len(schedule[rank]) for rank in range(ranks)):
        before = len(done)
        for rank, steps in enumerate(schedule):
            while len(spans[rank]) < len(steps):
                step = steps[len(spans[rank])]
                need = [found for piece in step for found in depends_on(piece, rank, ranks)]
                if not all(found in done for found in need):
                    break
                free = spans[rank][-1].end if spans[rank] else 0
                start = max([free, *(done[found] for found in need)])
                span = Span(start, start + durations.of(step), step)
                spans[rank].append(span)
                for piece in step:
                    kind = "b" if piece.kind == "B" else piece.kind
                    done[Piece(kind, piece.batch, piece.direction), rank] = span.end
        if len(done) == before:
            raise ValueError(f"no rank can go on after {[len(rank) for rank in spans]} steps")
    return Run(spans)


def one_forward_one_backward(ranks: int, batches: int) -> Schedule:
    """1F1B: as many forwards first as there are stages behind, then forward and backward in turn.

    Source: Narayanan et al., PipeDream-Flush, 2021; the comparison in DeepSeek-V3, 2024, table 2.
    """
    _check(ranks, batches)
    schedule = []
    for rank in range(ranks):
        ahead = ranks - 1 - rank
        steps = [(Piece("F", i),) for i in range(ahead)]
        for i in range(batches):
            if i + ahead < batches:
                steps.append((Piece("F", i + ahead),))
            steps.append((Piece("B", i),))
        schedule.append(steps)
    return schedule


def zero_bubble(ranks: int, batches: int) -> Schedule:
    """ZB1P: as 1F1B, but the gradients of weights are left for later, the further behind the stage the more of them.

    Rank s lags s micro-batches behind with W, so that all hold as many activations as the first rank of 1F1B.

    Source: Qi et al., Zero bubble pipeline parallelism, 2024, section 3.1 (ZB-H1).
    """
    _check(ranks, batches)
    schedule = []
    for rank, steps in enumerate(one_forward_one_backward(ranks, batches)):
        split, made = [], 0
        for step in steps:
            if step[0].kind == "F":
                split.append(step)
                continue
            split.append((Piece("b", step[0].batch),))
            if step[0].batch >= rank:
                split.append((Piece("W", made),))
                made += 1
        schedule.append(split + [(Piece("W", i),) for i in range(made, batches)])
    return schedule


def dualpipe(ranks: int, batches: int) -> Schedule:
    """DualPipe: half of the micro-batches enter at either end, so each rank holds two stages; F and B meet and overlap.

    Rank r holds stages r and P - 1 - r. "Near" below is the direction whose micro-batches enter at this half's end,
    "far" the other.

    Args:
        ranks: P, an even number.
        batches: Micro-batches of both directions together: an even number, at least 2 P.

    Raises:
        ValueError: If they are not.

    Source: DeepSeek-V3, 2024, section 3.2.1, figure 5; the eight phases of the released scheduler.
    """
    if ranks < 2 or ranks % 2 or batches % 2 or batches < 2 * ranks:
        need = (
            "an even number of ranks, and an even number of micro-batches, at least twice as many"
        )
        raise ValueError(f"need {need}; got {ranks} and {batches}")
    return [_dualpipe_rank(rank, ranks, batches) for rank in range(ranks)]


class _Order:
    """The steps of one rank, written down one after another; micro-batches of a direction go by in their order."""

    def __init__(self):
        self.steps: list[Step] = []
        self.later: list[Piece] = []  # whose W is left
        self.ahead, self.back = [0, 0], [0, 0]  # forwards and backwards so far, by direction

    def forward(self, side: int) -> None:
        self.steps.append((Piece("F", self.ahead[side], side),))
        self.ahead[side] += 1

    def backward(self, side: int, split: bool = False) -> None:
        self.steps.append((Piece("b" if split else "B", self.back[side], side),))
        self.later += self.steps[-1] if split else ()
        self.back[side] += 1

    def weights(self) -> None:
        self.steps.append((self.later.pop(0)._replace(kind="W"),))

    def together(self, ahead: int, back: int) -> None:
        self.forward(ahead)
        self.backward(back)
        self.steps[-2:] = [self.steps[-2] + self.steps[-1]]


def _dualpipe_rank(rank: int, ranks: int, batches: int) -> list[Step]:
    inner = min(rank, ranks - 1 - rank)  # 0 for the outermost ranks
    outer = ranks // 2 - 1 - inner  # 0 for the two in the middle
    near, far = (0, 1) if rank < ranks // 2 else (1, 0)
    order = _Order()
    for _ in range(2 * outer):
        order.forward(near)
    for _ in range(inner + 1):
        order.forward(near)
        order.forward(far)
    for _ in range(outer):
        order.backward(far, split=True)
        order.weights()
        order.forward(far)
    for i in range(batches // 2 - ranks + inner + 1):
        if i > 0 or outer > 0:
            order.together(near, far)
        else:  # in the middle the first two are not overlapped, since the other ranks wait for them
            order.forward(near)
            order.backward(far)
        order.together(far, near)
    for _ in range(outer):
        order.backward(far)
        order.together(far, near)
    for i in range(2 * (inner + 1)):  # the second half of these leave W for later
        order.backward((far, near)[i % 2], split=i > inner)
    for _ in range(outer):
        order.weights()
        order.backward(near, split=True)
    for _ in range(inner + 1):
        order.weights()
    return order.steps


def bubble(method: str, ranks: int, durations: Durations) -> float | int:
    """Return the published bubble of "1F1B", "ZB1P" or "DualPipe".

    1F1B's is that of the simulation at any durations, and ZB1P's where W <= F and W <= b. DualPipe's is that of the
    four middle ranks where besides F = b; where F > b, theirs is (P/2 - 1) (F&B + F - 2 W), which is more. Ranks
    further out overlap fewer pairs, each one fewer than the last, so they work longer and wait less.

    Raises:
        ValueError: If the method is another.

    Source: DeepSeek-V3, 2024, table 2.
    """
    t = durations
    if method == "1F1B":
        return (ranks - 1) * (t.forward + t.backward)
    if method == "ZB1P":
        return (ranks - 1) * (t.forward + t.backward - 2 * t.weights)
    if method == "DualPipe":
        return (ranks // 2 - 1) * (t.both + t.backward - 3 * t.weights)
    raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")


METHODS = {"1F1B": one_forward_one_backward, "ZB1P": zero_bubble, "DualPipe": dualpipe}
STAGES = {
    "1F1B": 1,
    "ZB1P": 1,
    "DualPipe": 2,
}  # that each rank holds: how often the parameters are there


def activations(method: str, ranks: int) -> int:
    """Return the published peak of activations, in micro-batches of one stage: P, P and P + 1."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    return ranks + (method == "DualPipe")


def _check(ranks: int, batches: int) -> None:
    if ranks < 1 or batches < ranks:
        raise ValueError(f"need ranks >= 1 and at least as many batches, got {ranks}, {batches}")


def draw(ax, run: Run, colors: dict[str, str] | None = None) -> None:
    """Draw a Gantt chart: a row for each rank, time from left to right.

    Micro-batches that enter at the last rank are hatched; of two pieces that are done together, each has half the row.

    Args:
        ax: Axes to draw on.
        run: From `simulate`.
        colors: For each kind of piece, if not the usual ones.
    """
    colors = colors or {"F": "#7fa8d9", "B": "#9bc18a", "b": "#c9dfb8", "W": "#e2b06a"}
    named: set[str] = set()
    for rank, spans in enumerate(run.spans):
        for span in spans:
            height = 0.9 / len(span.step)
            for place, piece in enumerate(span.step):
                ax.bar(
                    span.start,
                    height,
                    span.end - span.start,
                    rank - 0.45 + place * height,
                    align="edge",
                    color=colors[piece.kind],
                    edgecolor="white",
                    linewidth=0.3,
                    hatch="////" if piece.direction else None,
                    label=None if piece.kind in named else piece.kind,
                )
                named.add(piece.kind)
    ax.set(xlabel="time", ylabel="rank", yticks=range(len(run.spans)), xlim=(0, run.end))
    ax.invert_yaxis()


def compare_methods(
    ranks: int, batches: int, durations: Durations
) -> dict[str, dict[str, float | int]]:
    """Simulate all three: the largest bubble, its share of the time, and the peaks beside the published ones."""
    table = {}
    for name, make in METHODS.items():
        run = simulate(make(ranks, batches), durations)
        table[name] = {
            "bubble": max(run.bubbles),
            "published bubble": bubble(name, ranks, durations),
            "share": max(run.bubbles) / run.end,
            "activations": max(run.peaks),
            "published activations": activations(name, ranks),
            "parameters": STAGES[name],
        }
    return table
