"""From a picture of any size to patches: resize only what is too large, fill up to whole blocks, cut."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from noise2tokens.kimi_vl.moonvit import MOONVIT, Grid, VisionConfig

LIMIT = 4096  # patches of a picture, in the first release; 16384 in Kimi-VL-A3B-Thinking-2506
MOST_A_SIDE = (
    512  # positions a side for which the released code has rotary angles: fewer patches are allowed
)


@dataclass(frozen=True)
class Picture:
    """A picture as the encoder wants it.

    Attributes:
        patches: One row each, row by row of the picture; numbers from -1 to 1 in the order (channel, y, x).
        grid: Rows and columns of patches.
        content: Height and width in pixels that the picture itself takes; the rest is filled up.
    """

    patches: Float32[Tensor, "T P"]
    grid: Grid
    content: tuple[int, int]

    def tokens(self, merge: int = MOONVIT.merge) -> int:
        """What it costs the language model."""
        return self.grid[0] * self.grid[1] // merge**2


def resized(height: int, width: int, patch: int = 14, limit: int = LIMIT) -> tuple[int, int]:
    """Return the size that a picture is shrunk to: its own, unless it holds more whole patches than the limit.

    Both sides shrink by sqrt(limit / whole patches) and are rounded down, so the aspect ratio stays.

    Raises:
        ValueError: If a number is below 1.
        TypeError: If one is no integer.

    Source: released code of moonshotai/Kimi-VL-A3B-Instruct, image_processing_kimi_vl.py, `rescale`.
    """
    for name, value in (("height", height), ("width", width), ("patch", patch), ("limit", limit)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"need {name} >= 1, got {value}")
    whole = (height // patch) * (width // patch)
    if whole <= limit:
        return height, width
    scale = math.sqrt(limit / whole)
    return max(1, int(height * scale)), max(1, int(width * scale))


def grid_of(
    height: int,
    width: int,
    config: VisionConfig = MOONVIT,
    limit: int = LIMIT,
    *,
    crop: bool = False,
) -> Grid:
    """Return rows and columns of patches of a picture, after `resized` and filling up.

    The limit holds before filling up, as in the released code: 1000 x 1000 pixels become 901 x 901, then 924 x 924 and
    66 x 66 patches, more than 4096.

    Args:
        height, width: In pixels.
        config: Of the encoder.
        limit: Patches beyond which a picture is shrunk.
        crop: Cut off to whole blocks of merged patches in place of filling up.

    Raises:
        ValueError: If a side has 512 patches or more, or cropping leaves nothing.
    """
    block = config.patch * config.merge
    sides = resized(height, width, config.patch, limit)
    rows, columns = (side // block if crop else -(-side // block) for side in sides)
    if not rows or not columns:
        raise ValueError(f"need {block} pixels a side or more to crop, got {sides[0]} x {sides[1]}")
    grid = rows * config.merge, columns * config.merge
    if max(grid) >= MOST_A_SIDE:
        got = f"{grid[0]} x {grid[1]} of a picture of {height} x {width} pixels"
        raise ValueError(f"need fewer than {MOST_A_SIDE} patches a side, got {got}")
    return grid


def tokens(height: int, width: int, config: VisionConfig = MOONVIT, limit: int = LIMIT) -> int:
    """Return what a picture costs the language model: one token for each block of merged patches."""
    rows, columns = grid_of(height, width, config, limit)
    return rows * columns // config.merge**2


def preprocess(
    picture: Any, config: VisionConfig = MOONVIT, limit: int = LIMIT, *, crop: bool = False
) -> Picture:
    """Make patches of a picture.

    Too large ones are shrunk by PIL's bicubic filter. Then zeros, black, are added on the right and below up to whole
    blocks, or with `crop` the middle is cut out. Values 0 to 255 become -1 to 1.

    Args:
        picture: uint8 array or tensor of (height, width) or (height, width, channels); a PIL picture; or a file's path.
        config: Of the encoder; with one channel colors become gray, with three gray is repeated.
        limit: Patches beyond which a picture is shrunk.
        crop: Cut off in place of filling up.

    Raises:
        TypeError: If it is no picture, or not of 8 bits a channel.
        ValueError: If its shape is none of a picture, or `grid_of` refuses it.
    """
    pixels = as_pixels(picture, config.channels)
    height, width, _ = pixels.shape
    grid = grid_of(height, width, config, limit, crop=crop)
    sides = resized(height, width, config.patch, limit)
    if sides != (height, width):
        pixels = shrink(pixels, sides)
    whole = grid[0] * config.patch, grid[1] * config.patch
    if crop:
        top, left = ((side - kept) // 2 for side, kept in zip(sides, whole, strict=True))
        pixels = pixels[top : top + whole[0], left : left + whole[1]]
        return Picture(cut(pixels, config.patch), grid, whole)
    filled = np.zeros((*whole, config.channels), np.uint8)
    filled[: sides[0], : sides[1]] = pixels
    return Picture(cut(filled, config.patch), grid, sides)


def as_pixels(picture: Any, channels: int) -> np.ndarray:
    """Return a picture of any kind as a uint8 array (height, width, channels); errors as for `preprocess`."""
    if isinstance(picture, str | Path):
        with Image.open(picture) as file:
            picture = _upright(file)
    elif isinstance(picture, Image.Image):
        picture = _upright(picture)
    elif not isinstance(picture, np.ndarray | Tensor):
        raise TypeError(f"need an array, a PIL picture or a path, got {type(picture).__name__}")
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8:
        raise TypeError(f"need values 0 to 255 in uint8, got {pixels.dtype}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        need = "(height, width), (height, width, 1) or (height, width, 3)"
        raise ValueError(f"need a picture of {need}, got {np.shape(picture)}")
    if channels not in (1, 3):
        raise ValueError(f"need 1 or 3 channels, got {channels}")
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return pixels.repeat(3, 2)
    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]


def _upright(image: Image.Image) -> Image.Image:
    """Turn a photograph as its camera notes (EXIF), put what is transparent on white, and bring it to 8 bits of RGB."""
    if image.mode[0] in "IF":  # I, I;16 and F, which `convert` would cut off at 255
        raise TypeError(f"need 8 bits a channel, got a picture of mode {image.mode}")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def shrink(
    pixels: UInt8[np.ndarray, "H W C"], sides: tuple[int, int]
) -> UInt8[np.ndarray, "h w C"]:
    """Resize by PIL's bicubic filter, which weighs all pixels that fall into a new one."""
    one = pixels.shape[2] == 1
    image = Image.fromarray(pixels[:, :, 0] if one else pixels)
    small = np.asarray(image.resize(sides[::-1], Image.Resampling.BICUBIC))
    return small[:, :, None] if one else small


def cut(pixels: UInt8[np.ndarray, "H W C"], patch: int) -> Float32[Tensor, "T P"]:
    """Cut a picture of whole patches into them, row by row, and bring its values to -1 to 1."""
    rows, columns = (side // patch for side in pixels.shape[:2])
    blocks = pixels.reshape(rows, patch, columns, patch, -1).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(blocks.reshape(rows * columns, -1).astype(np.float32) / 127.5 - 1)


def to_square(picture: Any, side: int, channels: int = 3) -> UInt8[np.ndarray, "side side C"]:
    """Resize a picture to a square, as encoders of one resolution do: its aspect ratio is lost."""
    if side < 1:
        raise ValueError(f"need side >= 1, got {side}")
    return shrink(as_pixels(picture, channels), (side, side))
