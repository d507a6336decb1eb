"""A stream of packed rows that several workers make, and that goes on where it stopped: nothing lost, nothing twice.

Each worker packs its own share of the documents, and sends with every row how far it is: which document comes next,
and which ones wait in open bins. The consumer keeps the last message of each worker. That is the whole state, because
rows that workers have made ahead and nobody has received are made again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from noise2tokens.sequence_packing.layout import Packed, pack

TOO_LONG = ("error", "split", "drop")


@dataclass(frozen=True)
class Progress:
    """How far one worker is.

    Attributes:
        next: Place in the worker's share of the document that comes next.
        piece: Which piece of it, where it is split.
        open: Bins that wait: documents as (number, start, stop) in tokens.
    """

    next: int = 0
    piece: int = 0
    open: tuple[tuple[tuple[int, int, int], ...], ...] = ()


@dataclass(frozen=True)
class Row:
    """A packed row, the documents in it as (number, start, stop), and how far its worker was after it."""

    packed: Packed
    documents: tuple[tuple[int, int, int], ...]
    worker: int
    progress: Progress


class _Share(IterableDataset):
    """What one worker does: every `workers`-th document of a shuffled epoch, packed into rows."""

    def __init__(self, stream: "PackedStream"):
        self.stream = stream

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        count = max(1, self.stream.workers)
        # The worker whose turn it is next goes first, so that rows come in the order they would have come in.
        worker = ((info.id if info else 0) + self.stream.turn) % count
        yield from self.stream.rows(worker, self.stream.progress[worker])


class PackedStream:
    """Packed rows of shuffled documents, epoch after epoch, with a state that can be saved at any row.

    Args:
        documents: Token sequences; only their order is shuffled, so a list, a memory map or anything with numbers.
        capacity: Tokens a row, at most.
        workers: Processes that pack, 0 for none.
        open_bins: Rows that a worker fills side by side; 1 is next fit.
        seed: Of the order of the documents, together with the epoch.
        too_long: What to do with a document above the capacity: "error", "split" it, or "drop" it.

    Raises:
        ValueError: If a size is out of range, or `too_long` is something else. While iterating, if a document is too
            long and that is an error, or is empty.

    Iterating gives the rows that are left of the current epoch, as `Row`.
    """

    def __init__(
        self,
        documents: Sequence[Int64[Tensor, "_"]],
        capacity: int,
        *,
        workers: int = 0,
        open_bins: int = 8,
        seed: int = 0,
        too_long: str = "error",
    ):
        if not len(documents) or capacity < 1 or workers < 0 or open_bins < 1:
            raise ValueError(
                f"need documents, capacity >= 1, workers >= 0 and open_bins >= 1; got {len(documents)}, "
                f"{capacity}, {workers} and {open_bins}"
            )
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long must be one of {TOO_LONG}, got {too_long!r}")
        self.documents, self.capacity, self.workers = documents, capacity, workers
        self.open_bins, self.seed, self.too_long = open_bins, seed, too_long
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.turn = epoch, 0
        self.progress = [Progress() for _ in range(max(1, self.workers))]

    def order(self, worker: int) -> list[int]:
        """The documents of a worker's share, in this epoch's order."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(len(self.documents), generator=generator)
        return order[worker :: max(1, self.workers)].tolist()

    def rows(self, worker: int, progress: Progress) -> Iterator[Row]:
        """Pack a worker's share from where it stopped: each piece into the fullest open bin that has room.

        When no bin has room and no further one may be opened, the fullest is sent.
        """
        order, bins = self.order(worker), list(progress.open)
        skip = progress.piece
        for place in range(progress.next, len(order)):
            for number, piece in list(enumerate(self._pieces(order[place])))[skip:]:
                size = piece[2] - piece[1]
                room = [b for b in bins if _size(b) + size <= self.capacity]
                if not room and len(bins) == self.open_bins:
                    yield self._send(worker, bins, Progress(place, number))
                chosen = max(room, key=_size, default=())
                if chosen:
                    bins.remove(chosen)
                bins.append((*chosen, piece))
            skip = 0
        while bins:
            yield self._send(worker, bins, Progress(len(order)))

    def _pieces(self, number: int) -> list[tuple[int, int, int]]:
        size = len(self.documents[number])
        if size == 0:
            raise ValueError(f"document {number} is empty")
        if size <= self.capacity:
            return [(number, 0, size)]
        if self.too_long == "error":
            raise ValueError(
                f'document {number} has {size} tokens, a row {self.capacity}: choose too_long="split" or "drop"'
            )
        if self.too_long == "drop":
            return []
        cuts = range(0, size, self.capacity)
        return [(number, start, min(start + self.capacity, size)) for start in cuts]

    def _send(self, worker: int, bins: list, progress: Progress) -> Row:
        """Close the fullest bin."""
        pieces = max(bins, key=_size)
        bins.remove(pieces)
        tokens = [self.documents[number][start:stop] for number, start, stop in pieces]
        return Row(pack(tokens), pieces, worker, replace(progress, open=tuple(bins)))

    def __iter__(self) -> Iterator[Row]:
        count = max(1, self.workers)
        loader = DataLoader(_Share(self), batch_size=None, num_workers=self.workers)
        for row in loader:
            self.progress[row.worker] = row.progress
            self.turn = (row.worker + 1) % count
            yield row
        self._begin(self.epoch + 1)

    def settings(self) -> dict[str, Any]:
        """What decides which rows come in which order; a saved state is of use for these alone."""
        names = ("capacity", "workers", "open_bins", "seed", "too_long")
        return {"documents": len(self.documents)} | {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on after the last row that was received, as numbers and words in lists.

        Save it together with the model's state of the same step, in one file or not at all.
        """
        return {
            "settings": self.settings(),
            "epoch": self.epoch,
            "turn": self.turn,
            "progress": [
                {
                    "next": one.next,
                    "piece": one.piece,
                    "open": [[list(piece) for piece in b] for b in one.open],
                }
                for one in self.progress
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a stream with the same settings.

        Raises:
            ValueError: If a setting or the number of documents is another. That the documents themselves are the same
                is not checked: only their number is known.
        """
        here = self.settings()
        other = {name: state["settings"][name] for name in here}
        apart = [name for name in here if here[name] != other[name]]
        if apart:
            told = ", ".join(f"{name} {other[name]!r}, here {here[name]!r}" for name in apart)
            raise ValueError(f"the state is of another stream: {told}")
        self.epoch, self.turn = state["epoch"], state["turn"]
        self.progress = [
            Progress(one["next"], one["piece"], tuple(tuple(map(tuple, b)) for b in one["open"]))
            for one in state["progress"]
        ]


def _size(pieces: Sequence[tuple[int, int, int]]) -> int:
    return sum(stop - start for _, start, stop in pieces)
