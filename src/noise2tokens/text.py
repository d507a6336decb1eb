"""Text to learn from: the source of Python's standard library, as bytes or BPE tokens, in documents or windows.

    training, validation = split_files(corpus())
    tokens = Bytes()                                        or BPE.train(training.values(), vocab_size=1024)
    stream = torch.cat(documents(training, tokens))
    inputs, targets = windows(stream, length=128)(32)       `windows` makes what `training.fit` takes as its data
    bits_per_byte(loss, targets, tokens)                    comparable between tokenizers

A tokenizer has `encode` and `decode`, `vocab_size`, and `end`: the last token, which closes every document and is no
text. The vocabulary of bytes therefore has 257 entries; a model may well have more, for a size that suits its device.
"""

import ast
import io
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from jaxtyping import Int, Int64
from torch import Generator, Tensor

from noise2tokens.images import unpack


def corpus() -> dict[str, str]:
    """Load 1.2 MB of Python source: a fixed extract of the standard library of CPython 3.11.7.

    Returns:
        The text of each file by its name, such as "collections/__init__.py". All of it is ASCII.

    Raises:
        DataError: If the shipped file is damaged.

    Source:
        The Python Software Foundation (license in NOTICE); extracted by tools/make_corpus.py.
    """
    folder = Path(__file__).with_name("corpora")
    about = json.loads((folder / "stdlib.json").read_text(encoding="ascii"))
    text = unpack(folder / "stdlib.txt.gz", about["sha256"]).decode("ascii")
    ends = accumulate(about["files"].values())
    return {
        name: text[end - size : end]
        for (name, size), end in zip(about["files"].items(), ends, strict=True)
    }


class Tokens:
    """A vocabulary: what `Bytes` and `BPE` have in common.

    Args:
        pieces: The bytes that each token stands for; the end token, which stands for none, is added.

    Attributes:
        vocab_size: Number of tokens, the end token included.
        end: The token that closes a document.
        byte_lengths: Bytes of each token.
    """

    def __init__(self, pieces: list[bytes]):
        self.pieces = [*pieces, b""]
        self.vocab_size = len(self.pieces)
        self.end = self.vocab_size - 1
        self.byte_lengths: Int64[Tensor, "vocab_size"] = torch.tensor(
            [len(piece) for piece in self.pieces]
        )

    def encode(self, text: str) -> Int64[Tensor, "_"]:
        """Return the tokens of a text, without an end token; UnicodeEncodeError if it holds half a surrogate pair."""
        raise NotImplementedError

    def decode(self, tokens: Int[Tensor, "_"]) -> str:
        """Return the text of tokens, with "\\ufffd" in place of bytes that are no UTF-8; end tokens leave no trace.

        Raises:
            ValueError: If a token is not in the vocabulary.
        """
        if len(tokens) and not (0 <= tokens.min() and tokens.max() < self.vocab_size):
            got = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"tokens must be 0 to {self.vocab_size - 1}, got {got}")
        return b"".join(self.pieces[i] for i in tokens.tolist()).decode(errors="replace")


class Bytes(Tokens):
    """UTF-8 bytes as tokens 0 to 255."""

    def __init__(self):
        super().__init__([bytes([i]) for i in range(256)])

    def encode(self, text: str) -> Int64[Tensor, "_"]:
        """Return the bytes of a text."""
        return torch.tensor(list(text.encode()), dtype=torch.int64)


class BPE(Tokens):
    """Byte-pair encoding over bytes: any text can be encoded, and what is frequent is short.

    Args:
        tokenizer: A byte-level `tokenizers.Tokenizer` without special tokens; see `train`.

    Source: Sennrich et al. 2016; over bytes, with words split by a pattern first, in GPT-2 (Radford et al. 2019).
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        # Byte-level vocabularies spell bytes as characters: printable ones as themselves, the others from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        byte_of = {chr(byte): byte for byte in printable}
        byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
        words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        super().__init__([bytes(byte_of[character] for character in word) for word, _ in words])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 1024) -> "BPE":
        """Merge the most frequent pair again and again: the same texts give the same merges.

        Args:
            texts: What to count pairs in; take the training part only. 1 MB takes half a second.
            vocab_size: At most so many tokens: 256 bytes, the end token, and one for each merge.

        Returns:
            The tokenizer; it has fewer tokens where the texts have no pair left.

        Raises:
            ValueError: If `vocab_size` is below 257.
        """
        if vocab_size < 257:
            raise ValueError(
                f"256 bytes and the end token need vocab_size >= 257, got {vocab_size}"
            )
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def encode(self, text: str) -> Int64[Tensor, "_"]:
        """Return the tokens of a text."""
        text.encode()  # the library's error on half a surrogate pair says something else
        return torch.tensor(self.tokenizer.encode(text).ids, dtype=torch.int64)


def split_files(
    files: Mapping[str, str], validation: float = 0.1, seed: int = 0
) -> tuple[dict[str, str], dict[str, str]]:
    """Divide files at random, whole files only, so that no function is in both parts.

    Args:
        files: Texts by name.
        validation: The largest share of all characters that goes to validation; what files fit is used of it.
        seed: The same seed gives the same parts.

    Returns:
        The files to train on and those to validate on, each in the order given.

    Raises:
        ValueError: If the share is not between 0 and 1, or no file is small enough for it.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a share between 0 and 1, got {validation}")
    left = validation * sum(map(len, files.values()))
    held = set()
    for name in random.Random(seed).sample(sorted(files), len(files)):
        if len(files[name]) <= left:
            held.add(name)
            left -= len(files[name])
    if not held:
        raise ValueError(f"none of {len(files)} files fits into a share of {validation}")
    return (
        {name: text for name, text in files.items() if name not in held},
        {name: text for name, text in files.items() if name in held},
    )


def split_functions(source: str) -> list[str]:
    """Cut a Python module before each of its functions, classes and methods: joined, the pieces are the module again.

    Raises:
        SyntaxError: If it is not Python.
    """
    first_lines, bodies = {0}, [ast.parse(source).body]
    while bodies:
        for node in bodies.pop():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                lines = [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
                first_lines.add(min(lines) - 1)
            if isinstance(node, ast.ClassDef):
                bodies.append(node.body)
    lines = list(io.StringIO(source, newline=""))
    cuts = pairwise([*sorted(first_lines), len(lines)])
    return [piece for start, stop in cuts if (piece := "".join(lines[start:stop]))]


def documents(
    files: Mapping[str, str], tokens: Tokens, by: str = "function"
) -> list[Int64[Tensor, "_"]]:
    """Encode files as documents of very different lengths.

    Args:
        files: Texts by name; Python modules for "function".
        tokens: How to encode.
        by: "file", or "function" for the pieces of `split_functions`.

    Returns:
        The tokens of each document in order, closed by the end token.

    Raises:
        ValueError: If `by` is something else.
    """
    if by not in ("file", "function"):
        raise ValueError(f'documents are made by "file" or "function", got {by!r}')
    cut = split_functions if by == "function" else lambda text: [text]
    end = torch.tensor([tokens.end])
    return [
        torch.cat([tokens.encode(piece), end]) for text in files.values() for piece in cut(text)
    ]


def windows(
    stream: Int[Tensor, "n"], length: int, generator: Generator | None = None
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Make a source of random windows for training.

    Args:
        stream: Documents end to end, on the device to train on.
        length: Tokens of a window.
        generator: On the same device.

    Returns:
        A function of the batch size, which draws inputs (batch, length) and as targets the token that follows each.

    Raises:
        ValueError: If the stream is too short for one window and its targets.
    """
    _check_windows(stream, length)
    offsets = torch.arange(length + 1, device=stream.device)

    def draw(batch_size: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(
            len(stream) - length, (batch_size, 1), device=stream.device, generator=generator
        )
        rows = stream[starts + offsets]
        return rows[:, :-1], rows[:, 1:]

    return draw


def validation_windows(
    stream: Int[Tensor, "n"], length: int, count: int | None = None
) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count length"]]:
    """Cut a stream into windows that do not overlap, always the same; a rest shorter than a window is left out.

    Args:
        stream: Documents end to end.
        length: Tokens of a window.
        count: Take only so many, spread evenly over the stream.

    Returns:
        Inputs, and as targets the token that follows each.

    Raises:
        ValueError: If there are not so many windows.
    """
    _check_windows(stream, length)
    whole = (len(stream) - 1) // length
    if count is not None and not 1 <= count <= whole:
        raise ValueError(f"count must be 1 to {whole}, got {count}")
    count = whole if count is None else count
    rows = torch.arange(count, device=stream.device) * whole // count
    inputs, targets = (
        part[: whole * length].view(whole, length)[rows] for part in (stream[:-1], stream[1:])
    )
    return inputs, targets


def bits_per_byte(nats_per_token: float, targets: Int[Tensor, "*_"], tokens: Tokens) -> float:
    """Convert a mean loss to bits for each byte of text, which does not depend on the tokenizer.

    Args:
        nats_per_token: Mean loss over the targets; predicting the end of a document costs nats and gives no bytes.
        targets: What was predicted.
        tokens: How it was encoded.

    Raises:
        ValueError: If the targets hold no bytes.
    """
    total = int(tokens.byte_lengths.to(targets.device)[targets].sum())
    if not total:
        raise ValueError(f"need targets that stand for text, got {targets.numel()} without a byte")
    return nats_per_token * targets.numel() / total / math.log(2)


def _check_windows(stream: Tensor, length: int) -> None:
    if not 1 <= length < len(stream):
        raise ValueError(
            f"need 1 <= length < {len(stream)}, the number of tokens in the stream; got {length}"
        )
