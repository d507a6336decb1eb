"""Text and pictures in one sequence: where a picture stands in a prompt, it leaves as many image tokens as it costs.

sample = Sample(("what is the number? ", preprocess(array)), "407")
batch = collate([sample, ...], image_token=257)
loss = next_token_loss(model(batch.tokens, batch.patches, batch.grids), batch.labels)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from noise2tokens.kimi_vl.moonvit import MOONVIT, Grid
from noise2tokens.kimi_vl.preprocess import Picture
from noise2tokens.sequence_packing.layout import IGNORED, pad_batch
from noise2tokens.text import Bytes

TEXT = Bytes()


@dataclass(frozen=True)
class Sample:
    """A prompt of texts and pictures in their order, and the answer to it, in text."""

    prompt: tuple[str | Picture, ...]
    answer: str

    @property
    def pictures(self) -> list[Picture]:
        """Those of the prompt."""
        return [part for part in self.prompt if isinstance(part, Picture)]


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded on the right; their pictures end to end.

    Attributes:
        tokens: Prompts and answers.
        labels: The token that follows, where that belongs to an answer or ends it; else `IGNORED`.
        patches: Of all pictures, sample by sample; none where there is no picture.
        grids: Rows and columns of each.
    """

    tokens: Int64[Tensor, "B T"]
    labels: Int64[Tensor, "B T"]
    patches: Float[Tensor, "_ P"] | None
    grids: list[Grid]

    def to(self, device: torch.device) -> "Batch":
        """Move all tensors to a device."""
        patches = None if self.patches is None else self.patches.to(device)
        return Batch(self.tokens.to(device), self.labels.to(device), patches, self.grids)


def prompt_tokens(
    prompt: Sequence[str | Picture], image_token: int, merge: int = MOONVIT.merge
) -> Int64[Tensor, "T"]:
    """Return the bytes of a prompt's texts, and for each picture its image tokens.

    Raises:
        ValueError: If the prompt is empty, or the image token is one of text.
        TypeError: If a part is neither text nor picture.
    """
    if image_token < TEXT.vocab_size:
        raise ValueError(f"need an image token from {TEXT.vocab_size} on, got {image_token}")
    parts = [torch.empty(0, dtype=torch.int64)]
    for part in prompt:
        if isinstance(part, Picture):
            parts.append(torch.full((part.tokens(merge),), image_token))
        elif isinstance(part, str):
            parts.append(TEXT.encode(part))
        else:
            raise TypeError(f"a prompt holds texts and pictures, got {type(part).__name__}")
    tokens = torch.cat(parts)
    if not len(tokens):
        raise ValueError("need a prompt of one token or more")
    return tokens


def collate(samples: Sequence[Sample], image_token: int, merge: int = MOONVIT.merge) -> Batch:
    """Make a batch of samples with any number of pictures; errors as for `prompt_tokens` and `pad_batch`."""
    tokens, labels = [], []
    for sample in samples:
        prompt = prompt_tokens(sample.prompt, image_token, merge)
        answer = torch.cat([TEXT.encode(sample.answer), torch.tensor([TEXT.end])])
        tokens.append(torch.cat([prompt, answer[:-1]]))
        ignored = torch.full((len(prompt) - 1,), IGNORED)
        labels.append(torch.cat([ignored, answer]))
    patches, grids = pack_pictures([p for sample in samples for p in sample.pictures])
    return Batch(pad_batch(tokens, TEXT.end)[0], pad_batch(labels, IGNORED)[0], patches, grids)


def pack_pictures(
    pictures: Sequence[Picture],
) -> tuple[Float[Tensor, "T P"] | None, list[Grid]]:
    """Lay the patches of pictures end to end; None and no grids where there is no picture."""
    if not pictures:
        return None, []
    return torch.cat([p.patches for p in pictures]), [p.grid for p in pictures]
