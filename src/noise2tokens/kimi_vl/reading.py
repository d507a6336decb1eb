"""Something to read: handwritten digits on canvases of many sizes, and questions about them in text.

task = Task(glyphs(train=True), heights=(10, 40), widths=(10, 40), digits=(1, 3))
canvas, question, answer = task.draw(Random(0))
"""

from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Int64, UInt8
from torch import Tensor

from noise2tokens.images import digits, mnist, split

QUESTIONS = ("what is the number? ", "how many {digit}s? ")
TRAINING = 1297  # of the 1797 bundled digits; the others are for the test


@dataclass(frozen=True)
class Glyphs:
    """Pictures of single digits, and which digit each shows."""

    images: UInt8[np.ndarray, "n side side"]
    labels: Int64[np.ndarray, "n"]

    @property
    def side(self) -> int:
        """Height and width of a digit in pixels."""
        return self.images.shape[1]


def glyphs(train: bool) -> Glyphs:
    """Return scikit-learn's digits of 8 x 8 pixels, those of the training or those of the test; values 0 to 255."""
    images, labels = digits()
    parts = split(len(labels), (TRAINING, len(labels) - TRAINING), seed=0)
    return _glyphs(images * (255 / 16), labels, parts[0 if train else 1])


def mnist_glyphs(train: bool) -> Glyphs:
    """Return MNIST's digits of 28 x 28 pixels, of its training or its test set."""
    images, labels = mnist(train)
    return _glyphs(images, labels, slice(None))


def _glyphs(images: Tensor, labels: Tensor, part: Tensor | slice) -> Glyphs:
    return Glyphs(images[part].round().byte().numpy(), labels[part].numpy())


@dataclass(frozen=True)
class Task:
    """What is drawn and asked.

    A canvas is divided into cells; digits go into some of them, each to a random place in its cell. They are read as
    text is: row by row, from left to right.

    Attributes:
        glyphs: Digits to draw.
        heights, widths: Of canvases in pixels: least and most.
        digits: On a canvas: least and most; less where a canvas has fewer cells.
        room: Pixels that a cell is wider and higher than a digit.
        step: Digits stand at multiples of so many pixels.
        questions: Which of `QUESTIONS` are asked.
    """

    glyphs: Glyphs
    heights: tuple[int, int]
    widths: tuple[int, int]
    digits: tuple[int, int] = (1, 3)
    room: int = 4
    step: int = 1
    questions: tuple[str, ...] = QUESTIONS[:1]

    def __post_init__(self):
        for name in ("heights", "widths", "digits"):
            least, most = getattr(self, name)
            low = 1 if name == "digits" else self.cell
            if not low <= least <= most:
                raise ValueError(f"{name} must rise from {low} or more, got {least} to {most}")
        if self.room < 0 or self.step < 1:
            raise ValueError(f"need room >= 0 and step >= 1, got {self.room} and {self.step}")
        if not self.questions or not set(self.questions) <= set(QUESTIONS):
            raise ValueError(f"need questions out of {QUESTIONS}, got {self.questions}")

    @property
    def cell(self) -> int:
        """Height and width of a cell in pixels."""
        return self.glyphs.side + self.room

    def draw(self, generator: Random) -> tuple[UInt8[np.ndarray, "H W"], str, str]:
        """Draw a canvas, a question about it, and the answer."""
        height, width = (generator.randint(*sizes) for sizes in (self.heights, self.widths))
        rows, columns = height // self.cell, width // self.cell
        number = generator.randint(*(min(count, rows * columns) for count in self.digits))
        cells = sorted(generator.sample(range(rows * columns), number))
        chosen = [generator.randrange(len(self.glyphs.labels)) for _ in cells]
        canvas = np.zeros((height, width), np.uint8)
        top = self._place(height - rows * self.cell, generator)  # of the cells as a whole
        left = self._place(width - columns * self.cell, generator)
        for cell, i in zip(cells, chosen, strict=True):
            y = top + cell // columns * self.cell + self._place(self.room, generator)
            x = left + cell % columns * self.cell + self._place(self.room, generator)
            canvas[y : y + self.glyphs.side, x : x + self.glyphs.side] = self.glyphs.images[i]
        return canvas, *self.ask([int(self.glyphs.labels[i]) for i in chosen], generator)

    def _place(self, room: int, generator: Random) -> int:
        return self.step * generator.randint(0, room // self.step)

    def ask(self, shown: list[int], generator: Random) -> tuple[str, str]:
        """Return a question about digits in their order, and its answer."""
        question = generator.choice(self.questions)
        if question == QUESTIONS[0]:
            return question, "".join(map(str, shown))
        # half of the time about a digit that is there
        digit = generator.choice(shown) if generator.random() < 0.5 else generator.randrange(10)
        return question.format(digit=digit), str(shown.count(digit))
