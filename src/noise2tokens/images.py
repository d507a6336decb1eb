"""The book's pictures: real, small, and the same for everyone.

Digits and photographs come with scikit-learn and scikit-image, so a chapter runs without a network. Only MNIST is
fetched, once, into the user's cache folder, and it is compared with a SHA-256 whenever it is read, so that a result
cannot come from other data than its author's. Pictures come as the integers that they are; `dequantize` makes of them
the real numbers that a density model needs.
"""

import gzip
import hashlib
import math
import os
import struct
import zlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import requests
import torch
from filelock import FileLock
from jaxtyping import Float, Float32, Int64, Real, UInt8
from PIL import Image
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.nn import functional as F

from noise2tokens.training import live

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# Of the decompressed content: the same pictures, compressed anew, are the same data.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
PHOTOGRAPHS = {
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
    "skimage.data": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"),
}


class DataError(RuntimeError):
    """A data set cannot be had, or is not what it should be."""


class _Truncated(DataError):
    pass


def digits() -> tuple[Float32[Tensor, "1797 8 8"], Int64[Tensor, "1797"]]:
    """Load the handwritten digits that come with scikit-learn.

    Returns:
        Images with integer values 0 to 16, and the digit that each shows.

    Source:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, 1998 (its test set).
    """
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32), torch.tensor(
        bunch.target, dtype=torch.int64
    )


def mnist(train: bool) -> tuple[UInt8[Tensor, "n 28 28"], Int64[Tensor, "n"]]:
    """Load MNIST; download it on first use.

    The files are read from the folder that the environment variable NOISE2TOKENS_DATA names. Where
    it is not set they go to the user's cache folder, and a download that broke off is continued.

    Args:
        train: The 60,000 training images, or else the 10,000 test images.

    Returns:
        Images with values 0 to 255, and the digit that each shows.

    Raises:
        DataError: If a file is missing, cannot be downloaded, or has the wrong content.

    Source:
        LeCun et al., Gradient-based learning applied to document recognition, 1998.
    """
    prefix = "train" if train else "t10k"
    images = _read_idx(_mnist_file(f"{prefix}-images-idx3-ubyte"), axes=3)
    labels = _read_idx(_mnist_file(f"{prefix}-labels-idx1-ubyte"), axes=1)
    return images, labels.long()


def _mnist_file(name: str) -> bytes:
    folder = os.environ.get("NOISE2TOKENS_DATA")
    if not folder:
        import pooch  # here, since it loads tqdm's notebook bar, which warns where ipywidgets is missing

        return _fetch(name, pooch.os_cache("noise2tokens") / "mnist")
    path = Path(folder, f"{name}.gz")
    if not path.is_file():
        raise DataError(f"no file {path.name} in {folder}, the folder that NOISE2TOKENS_DATA names")
    return unpack(path, MNIST_SHA256[name])


def _fetch(name: str, folder: Path) -> bytes:
    """Return the content of name.gz in a folder; get it from the first mirror that has it right."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{name}.gz", folder / f"{name}.gz.part"
    said = {}
    with FileLock(f"{path}.lock"):  # two chapters may ask for it at the same time
        if path.exists():
            try:
                return unpack(path, MNIST_SHA256[name])
            except DataError:
                path.unlink()
        # Twice each: what broke off is continued, and a part that proves bad is fetched anew.
        for url in [mirror + path.name for mirror in MNIST_MIRRORS] * 2:
            try:
                _continue_download(url, part)
                content = unpack(part, MNIST_SHA256[name])
            except (requests.RequestException, _Truncated) as error:
                said[url] = f"{error} ({part.stat().st_size} bytes are kept for the next call)"
            except DataError as error:
                said[url] = error
                part.unlink()
            else:
                part.replace(path)
                return content
    answers = "".join(f"\n  {url}: {answer}" for url, answer in said.items())
    raise DataError(
        f"could not download {path.name}:{answers}\nWithout a network: put the four .gz files of "
        "MNIST into a folder and set the environment variable NOISE2TOKENS_DATA to its path."
    )


def _continue_download(url: str, part: Path) -> None:
    """Append to a file what it lacks of a URL.

    Of pooch only the downloader is used: `pooch.retrieve` deletes what a broken download left.
    """
    import pooch

    with part.open("ab") as file:

        def start_anew_if_whole(response: requests.Response, **_) -> None:
            if response.status_code == 200:  # a server that knows ranges answers 206
                file.truncate(0)

        headers = {"Range": f"bytes={file.tell()}-", "Accept-Encoding": "identity"}
        hooks = {"response": start_anew_if_whole}
        try:
            pooch.HTTPDownloader(live(), headers=headers, hooks=hooks, timeout=10)(url, file, None)
        except requests.HTTPError as error:
            if error.response.status_code != 416:  # 416: nothing is lacking
                raise


def unpack(path: Path, sha256: str) -> bytes:
    """Decompress a .gz file and compare the SHA-256 of its content.

    Raises:
        DataError: If the file is truncated, no gzip file, or holds something else.
    """
    compressed = path.read_bytes()
    try:
        content = gzip.decompress(compressed)
    except EOFError as error:
        raise _Truncated(
            f"{path} is truncated: more should follow its {len(compressed)} bytes"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} has the wrong content, it is no intact gzip file: {error}"
        ) from error
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise DataError(
            f"{path} has the wrong content: decompressed SHA-256 {got}, expected {sha256}"
        )
    return content


def _read_idx(content: bytes, axes: int) -> UInt8[Tensor, "..."]:
    """Read IDX: 00 00 08, number of axes; each axis' length, 32 bits big-endian; the bytes."""
    start = 4 + 4 * axes
    magic = bytes([0, 0, 8, axes])
    if content[:4] != magic or len(content) < start:
        got = content[:start].hex()
        raise DataError(f"wrong IDX header: got {got}, expected {magic.hex()} and {axes} lengths")
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) != start + math.prod(shape):
        raise DataError(
            f"wrong IDX header: it says shape {shape}, but {len(content) - start} bytes follow"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)


def dequantize(
    values: Real[Tensor, "*shape"], levels: int, generator: Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Spread integers over the real numbers: (values + u) / levels, with u uniform on [0, 1).

    Args:
        values: Integers from 0 to levels - 1, in any dtype.
        levels: How many values there can be: 17 for `digits`, 256 for `mnist`.
        generator: Source of the noise, on the device of `values`; PyTorch's own where left out.

    Returns:
        Numbers in [0, 1]. (1 itself can come up: a float32 sum may round to the next integer.)

    Raises:
        ValueError: If a value is no integer or out of range. Not checked on a GPU, where every
            training step would have to wait for the answer.

    Source:
        Theis et al., A note on the evaluation of generative models, 2016, Section 3.1.
    """
    if values.device.type == "cpu" and values.numel():
        low, high = values.min().item(), values.max().item()
        fractions = values.is_floating_point() and not torch.equal(values, values.round())
        if low < 0 or high > levels - 1 or fractions:
            kind = "fractions" if fractions else "integers"
            raise ValueError(f"expected integers 0 to {levels - 1}, got {kind} {low} to {high}")
    return (values + torch.rand(values.shape, generator=generator, device=values.device)) / levels


def split(n: int, sizes: tuple[int, ...], seed: int) -> tuple[Int64[Tensor, "_"], ...]:
    """Divide n samples at random, for example into training, validation and test.

    Args:
        n: Number of samples.
        sizes: How many go into each part; together n.
        seed: The same seed gives the same parts.

    Returns:
        The indices of each part.

    Raises:
        ValueError: If the sizes do not add up to n, or one is negative.
    """
    if sum(sizes) != n or min(sizes, default=0) < 0:
        raise ValueError(
            f"sizes must be non-negative and add up to {n}, got {sizes}: {sum(sizes)} in all"
        )
    return torch.randperm(n, generator=Generator().manual_seed(seed)).split(list(sizes))


def photographs() -> dict[str, UInt8[Tensor, "_ _ 3"]]:
    """Load the color photographs that come with scikit-learn and scikit-image.

    They are read as files: scikit-image's own functions would download a picture that is not there.

    Returns:
        Pictures by name, values 0 to 255: china, flower, astronaut, chelsea, coffee, rocket.

    Raises:
        DataError: If an installed library does not hold its pictures.

    Source:
        CC BY 2.0: china (danielbuechele), flower (vultilion). Public domain or CC0: astronaut
        (NASA), chelsea (Stefan van der Walt), coffee (Rachel Michetti), rocket (SpaceX).
    """
    pictures = {}
    for package, names in PHOTOGRAPHS.items():
        for name in names:
            path = files(package) / name
            if not path.is_file():
                raise DataError(
                    f"no picture {name} in {files(package)}: is that library fully installed?"
                )
            with path.open("rb") as file:
                pictures[name.split(".")[0]] = torch.tensor(
                    np.array(Image.open(file).convert("RGB"))
                )
    return pictures


def pad_to_32(images: Real[Tensor, "n 28 28"]) -> Real[Tensor, "n 1 32 32"]:
    """Add the channel axis and two pixels of 0 on every side, so that the size can be halved five times."""
    return F.pad(images[:, None], (2, 2, 2, 2))
