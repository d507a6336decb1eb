"""The book's data: real, small, and the same for everyone.

Almost all of it comes with this package or with a library that it needs, so a chapter runs without
a network: digits and photographs from scikit-learn and scikit-image, 2-D toys whose density is
known, and a text corpus shipped as a file. Only MNIST is fetched, once, into the user's cache
folder. MNIST and the corpus are compared with a SHA-256 whenever they are read, so a result cannot
come from other data than its author's. Pictures come as the integers that they are; `dequantise`
makes of them the real numbers that a density model needs.
"""

import gzip
import hashlib
import json
import math
import os
import struct
import zlib
from importlib.resources import files
from itertools import accumulate
from pathlib import Path

import numpy as np
import requests
import torch
from filelock import FileLock
from jaxtyping import Float, Float32, Int64, Real, UInt8
from PIL import Image
from sklearn.datasets import load_digits
from torch import Generator, Tensor

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
    return _unpack(path, MNIST_SHA256[name])


def _fetch(name: str, folder: Path) -> bytes:
    """Return the content of name.gz in a folder; get it from the first mirror that has it right."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{name}.gz", folder / f"{name}.gz.part"
    said = {}
    with FileLock(f"{path}.lock"):  # two chapters may ask for it at the same time
        if path.exists():
            try:
                return _unpack(path, MNIST_SHA256[name])
            except DataError:
                path.unlink()
        # Twice each: what broke off is continued, and a part that proves bad is fetched anew.
        for url in [mirror + path.name for mirror in MNIST_MIRRORS] * 2:
            try:
                _continue_download(url, part)
                content = _unpack(part, MNIST_SHA256[name])
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


def _unpack(path: Path, sha256: str) -> bytes:
    """Decompress a .gz file and compare the SHA-256 of its content."""
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


def dequantise(
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


MOONS_NOISE = 0.05
# Over both arcs: E x = 1/2, E y = 1/4, Var x = 1/2 + 1/4, Var y = E (sin t - 1/4)^2,
# which is 1/2 - 1/pi + 1/16.
MOONS_MEAN = (0.5, 0.25)
MOONS_STD = (math.sqrt(3 / 4 + MOONS_NOISE**2), math.sqrt(9 / 16 - 1 / math.pi + MOONS_NOISE**2))
EIGHT_RADIUS, EIGHT_STD = 2.0, 0.15


def toy(name: str, n: int, generator: Generator) -> Float32[Tensor, "{n} 2"]:
    """Draw independent points from a 2-D distribution whose density is known.

    Args:
        name: "moons": two half circles of radius 1 with Gaussian noise of 0.05, then standardised
            by that distribution's mean and standard deviation (not the sample's). "eight_gaussians":
            standard deviation 0.15, centres evenly on the circle of radius 2, not standardised.
        n: Number of points.
        generator: Source of the randomness, on the CPU.

    Returns:
        The points.

    Raises:
        ValueError: If there is no such distribution, or n is negative.
    """
    if name not in ("moons", "eight_gaussians") or n < 0:
        raise ValueError(f"expected 'moons' or 'eight_gaussians' and n >= 0, got {name!r} and {n}")
    if name == "moons":
        arcs = _moon_arcs(math.pi * torch.rand(n, generator=generator))
        centres = arcs[torch.randint(2, (n,), generator=generator), torch.arange(n)]
        points = centres + MOONS_NOISE * torch.randn(n, 2, generator=generator)
        return (points - torch.tensor(MOONS_MEAN)) / torch.tensor(MOONS_STD)
    centres = eight_gaussian_centres().float()[torch.randint(8, (n,), generator=generator)]
    return centres + EIGHT_STD * torch.randn(n, 2, generator=generator)


def moons_log_density(x: Float[Tensor, "n 2"]) -> Float[Tensor, "n"]:
    """Evaluate the density that `toy("moons", ...)` draws from.

    Each arc's density is the mean of a Gaussian whose centre runs along the arc: an integral over
    the angle, done with Gauss-Legendre nodes so dense (at most 0.8 noise widths apart) that the
    error is one of rounding.

    Args:
        x: Points, standardised as `toy` returns them.

    Returns:
        Log density in nats. The entropy, which no model's mean negative log density can beat, is
        1.1312.
    """
    nodes, weights = np.polynomial.legendre.leggauss(128)
    arcs = _moon_arcs(torch.tensor(math.pi / 2 * (nodes + 1))).flatten(0, 1)
    scale = torch.tensor(MOONS_STD, dtype=torch.float64, device=x.device)
    points = x.double() * scale + torch.tensor(MOONS_MEAN, dtype=torch.float64, device=x.device)
    log_density = _mixture(points, arcs, torch.tensor(weights / 4).repeat(2), MOONS_NOISE)
    return (log_density + scale.log().sum()).to(x.dtype)


def eight_gaussians_log_density(x: Float[Tensor, "n 2"]) -> Float[Tensor, "n"]:
    """Evaluate the density that `toy("eight_gaussians", ...)` draws from.

    Args:
        x: Points.

    Returns:
        Log density in nats. The entropy, which no model's mean negative log density can beat, is
        1.1231.
    """
    weights = torch.full((8,), 1 / 8, dtype=torch.float64)
    return _mixture(x.double(), eight_gaussian_centres(), weights, EIGHT_STD).to(x.dtype)


def _moon_arcs(angle: Float[Tensor, "n"]) -> Float[Tensor, "2 n 2"]:
    x, y = angle.cos(), angle.sin()
    return torch.stack([torch.stack([x, y], -1), torch.stack([1 - x, 0.5 - y], -1)])


def eight_gaussian_centres() -> Float[Tensor, "8 2"]:
    """Return the centres of `toy("eight_gaussians", ...)`, in float64."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return EIGHT_RADIUS * torch.stack([angle.cos(), angle.sin()], -1)


def _mixture(
    x: Float[Tensor, "n 2"], centres: Float[Tensor, "k 2"], weights: Float[Tensor, "k"], std: float
) -> Float[Tensor, "n"]:
    """Log density of a mixture of round Gaussians."""
    exponent = -(x[:, None] - centres.to(x.device)).square().sum(-1) / (2 * std**2)
    normaliser = math.log(2 * math.pi * std**2)
    return torch.logsumexp(exponent + weights.to(x.device).log(), -1) - normaliser


def corpus() -> dict[str, str]:
    """Load 1.2 MB of Python source: a fixed extract of the standard library of CPython 3.11.7.

    Returns:
        The text of each file by its name, such as "collections/__init__.py". All of it is ASCII.

    Raises:
        DataError: If the shipped file is damaged.

    Source:
        The Python Software Foundation (licence in NOTICE); extracted by tools/make_corpus.py.
    """
    folder = Path(__file__).with_name("corpora")
    about = json.loads((folder / "stdlib.json").read_text(encoding="ascii"))
    text = _unpack(folder / "stdlib.txt.gz", about["sha256"]).decode("ascii")
    ends = accumulate(about["files"].values())
    return {
        name: text[end - size : end]
        for (name, size), end in zip(about["files"].items(), ends, strict=True)
    }


def photographs() -> dict[str, UInt8[Tensor, "_ _ 3"]]:
    """Load the colour photographs that come with scikit-learn and scikit-image.

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
