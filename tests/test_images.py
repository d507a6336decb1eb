"""The book's data: the shipped is intact, the drawn has its density, the fetched is right.

Downloads are tested against an HTTP server on this machine that misbehaves as real ones do.
"""

import gzip
import hashlib
import math
import os
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pooch
import pytest
import torch
from sklearn.datasets import load_sample_image

from noise2tokens import images as data
from noise2tokens.images import (
    DataError,
    dequantize,
    digits,
    mnist,
    photographs,
    split,
)

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- MNIST: a small imitation of it, served from this machine ---


def idx(array):
    return (
        struct.pack(f">4B{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
        + array.numpy().tobytes()
    )


class Server(ThreadingHTTPServer):
    """Serves /<mode>/<file>; notes every request: mode, file, start of the range, status."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests = files, []

    def mirror(self, mode):
        return f"http://127.0.0.1:{self.server_port}/{mode}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        _, mode, name = unquote(self.path).split("/")
        body = self.server.files[name]
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        status = 206
        if mode == "missing":
            status, body, start = 404, b"", 0
        elif mode in ("no-range", "stump"):
            status, start = 200, 0
        elif mode == "html":
            status, body, start = 200, b"<html>please log in to this network</html>", 0
        elif mode == "other":
            status, body, start = 200, gzip.compress(b"other content"), 0
        elif start >= len(body):
            status, body, start = 416, b"", 0
        self.server.requests.append((mode, name, start, status))
        rest = body[start:]
        self.send_response(status)
        if mode != "breaks silently":
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        # The length above is honest; these close the connection before it is reached.
        breaks = mode in ("breaks", "breaks silently", "stump")
        self.wfile.write(rest[: len(rest) // 2] if breaks else rest)

    def log_message(self, *args):
        pass


@pytest.fixture
def fake():
    images = torch.randint(256, (20, 28, 28), generator=generator(), dtype=torch.uint8)
    return images, torch.arange(20, dtype=torch.uint8) % 10


@pytest.fixture
def server(fake, tmp_path, monkeypatch):
    contents = {IMAGES: idx(fake[0]), LABELS: idx(fake[1])}
    monkeypatch.setattr(
        data, "MNIST_SHA256", {k: hashlib.sha256(v).hexdigest() for k, v in contents.items()}
    )
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    monkeypatch.delenv("NOISE2TOKENS_DATA", raising=False)
    running = Server({f"{k}.gz": gzip.compress(v) for k, v in contents.items()})
    threading.Thread(target=running.serve_forever, args=[0.01], daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "noise2tokens" / "mnist"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def use(server, monkeypatch):
    def set_mirrors(*modes):
        mirrors = tuple(
            "http://127.0.0.1:1/" if mode == "dead" else server.mirror(mode) for mode in modes
        )
        monkeypatch.setattr(data, "MNIST_MIRRORS", mirrors)
        server.requests.clear()
        return mirrors

    return set_mirrors


def assert_loads(fake):
    images, labels = mnist(train=False)
    assert torch.equal(images, fake[0]) and images.dtype == torch.uint8
    assert torch.equal(labels, fake[1].long()) and labels.dtype == torch.int64


def kept(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize(
    "modes", [["good"], ["no-range"], ["dead", "good"], ["missing", "other", "html", "good"]]
)
def test_mnist_is_downloaded_once_from_the_first_mirror_that_has_it(
    modes, use, server, cache, fake
):
    use(*modes)
    assert_loads(fake)
    assert kept(cache) == [f"{IMAGES}.gz", f"{LABELS}.gz"]
    server.requests.clear()
    assert_loads(fake)
    assert server.requests == []


def test_a_broken_download_is_continued_by_the_next_mirror(use, server, cache, fake):
    use("breaks", "good")
    assert_loads(fake)
    (_, _, first, _), (mode, _, second, status) = [
        r for r in server.requests if r[1] == f"{IMAGES}.gz"
    ]
    size = len(server.files[f"{IMAGES}.gz"])
    # urllib3 may drop an incomplete last chunk of 1 KiB
    assert (
        first == 0 and mode == "good" and status == 206 and size // 2 - 1024 <= second <= size // 2
    )


@pytest.mark.parametrize(
    "mode, says", [("breaks", "Connection broken"), ("breaks silently", "truncated")]
)
def test_a_broken_download_is_kept_for_the_next_call(mode, says, use, server, cache, fake):
    whole = server.files[f"{IMAGES}.gz"]
    use(mode)
    with pytest.raises(DataError, match=f"(?s)could not download.*{says}.*kept for the next call"):
        mnist(train=False)
    assert kept(cache) == [f"{IMAGES}.gz.part"]
    part = (cache / f"{IMAGES}.gz.part").read_bytes()
    assert len(part) > len(whole) // 2 and whole.startswith(part)  # the second attempt came further
    use("good")
    assert_loads(fake)
    assert server.requests[0] == ("good", f"{IMAGES}.gz", len(part), 206)
    assert kept(cache) == [f"{IMAGES}.gz", f"{LABELS}.gz"]


def test_a_server_without_ranges_sends_it_all_again(use, server, cache, fake):
    (cache / f"{IMAGES}.gz.part").write_bytes(server.files[f"{IMAGES}.gz"][:5000])
    use("no-range")
    assert_loads(fake)
    assert [r[3] for r in server.requests] == [200, 200]


def test_a_server_that_never_sends_all_is_given_up(use, server, cache):
    use("stump")
    with pytest.raises(DataError, match="Connection broken"):
        mnist(train=False)
    assert len(server.requests) == 2


def test_a_complete_part_is_taken_over(use, server, cache, fake):
    (cache / f"{IMAGES}.gz.part").write_bytes(server.files[f"{IMAGES}.gz"])
    use("good")
    assert_loads(fake)
    assert server.requests[0][3] == 416


@pytest.mark.parametrize("length", [3000, 100_000], ids=["shorter", "longer"])
def test_a_part_with_the_wrong_start_is_thrown_away_and_fetched_anew(
    length, use, server, cache, fake
):
    (cache / f"{IMAGES}.gz.part").write_bytes(b"\1" * length)
    use("good")
    assert_loads(fake)


@pytest.mark.parametrize(
    "mode, says", [("other", hashlib.sha256(b"other content").hexdigest()), ("html", "no intact")]
)
def test_wrong_content_is_refused_and_not_kept(mode, says, use, cache):
    (mirror,) = use(mode)
    with pytest.raises(DataError) as error:
        mnist(train=False)
    expected = data.MNIST_SHA256[IMAGES]
    assert says in str(error.value) and mirror in str(error.value)
    assert mode == "html" or f"expected {expected}" in str(error.value)
    assert kept(cache) == []


def test_a_damaged_file_in_the_cache_is_replaced(use, server, cache, fake):
    use("good")
    assert_loads(fake)
    for damage in (
        b"",
        b"\0\0",
        server.files[f"{IMAGES}.gz"][:-9],
        gzip.compress(b"other content"),
    ):
        (cache / f"{IMAGES}.gz").write_bytes(damage)
        assert_loads(fake)
    assert kept(cache) == [f"{IMAGES}.gz", f"{LABELS}.gz"]


def test_without_a_network_the_error_names_every_mirror_and_the_way_out(use, cache):
    mirrors = use("dead", "missing")
    with pytest.raises(DataError) as error:
        mnist(train=False)
    message = str(error.value)
    assert all(f"{mirror}{IMAGES}.gz: " in message for mirror in mirrors)
    assert "NOISE2TOKENS_DATA" in message and "404" in message and "refused" in message


def test_two_callers_at_once_download_it_once(use, server, cache, fake):
    use("good")
    results = []
    callers = [
        threading.Thread(target=lambda: results.append(mnist(train=False))) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4 and all(torch.equal(images, fake[0]) for images, _ in results)
    assert len(server.requests) == 2


def test_a_folder_of_ones_own_is_read_and_nothing_is_downloaded(
    use, server, cache, fake, tmp_path, monkeypatch
):
    use("good")
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("NOISE2TOKENS_DATA", str(own))
    with pytest.raises(DataError, match=f"{IMAGES}.gz in {own}"):
        mnist(train=False)
    for name, body in server.files.items():
        (own / name).write_bytes(
            gzip.compress(gzip.decompress(body), 1)
        )  # the content counts, not its compression
    assert_loads(fake)
    (own / f"{LABELS}.gz").write_bytes(server.files[f"{LABELS}.gz"][:-3])
    with pytest.raises(DataError, match="truncated"):
        mnist(train=False)
    (own / f"{LABELS}.gz").write_bytes(server.files[f"{IMAGES}.gz"])
    with pytest.raises(DataError, match=f"expected {data.MNIST_SHA256[LABELS]}"):
        mnist(train=False)
    assert (
        server.requests == [] and (own / f"{LABELS}.gz").exists()
    )  # a reader's own file is never deleted


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "wrong IDX header: got , expected 00000803"),
        (bytes([0, 0, 8, 3]) + bytes(5), "got 000008030000000000, expected 00000803 and 3 lengths"),
        (bytes([0, 0, 8, 1]) + bytes(12), "got 00000801"),
        (bytes([0, 0, 9, 3]) + bytes(12), "got 00000903"),
        (
            struct.pack(">4B3I", 0, 0, 8, 3, 2, 28, 28) + bytes(1567),
            r"shape \(2, 28, 28\), but 1567 bytes",
        ),
        (
            struct.pack(">4B3I", 0, 0, 8, 3, 2, 28, 28) + bytes(1569),
            r"shape \(2, 28, 28\), but 1569 bytes",
        ),
    ],
)
def test_a_wrong_idx_header_is_named(content, says):
    with pytest.raises(DataError, match=says):
        data._read_idx(content, axes=3)


@pytest.mark.skipif(
    "NOISE2TOKENS_DATA" not in os.environ, reason="NOISE2TOKENS_DATA names no folder with MNIST"
)
def test_the_real_mnist():
    images, labels = mnist(train=True)
    test_images, test_labels = mnist(train=False)
    assert images.shape == (60000, 28, 28) and test_images.shape == (10000, 28, 28)
    assert labels.bincount().tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert test_labels.bincount().tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    scaled = images.double() / 255  # the two numbers that every MNIST example normalizes by
    assert scaled.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert scaled.std().item() == pytest.approx(0.3081, abs=5e-5)


# --- Digits, dequantization, splits ---


def test_digits_are_integers_up_to_16(no_network):
    images, labels = digits()
    assert images.dtype == torch.float32 and torch.equal(images, images.round())
    assert (images.min(), images.max()) == (0, 16)
    assert labels[:10].tolist() == list(range(10)) and labels.bincount().min() == 174


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64])
def test_dequantized_values_lie_in_their_bins_with_uniform_noise(dtype):
    values = torch.randint(17, (300_000,), generator=generator(1)).to(dtype)
    result = dequantize(values, 17, generator(2))
    assert result.dtype == (dtype if dtype.is_floating_point else torch.float32)
    noise = result.double() * 17 - values
    assert noise.min() > -1e-5 and noise.max() < 1 + 1e-5
    assert noise.mean().item() == pytest.approx(1 / 2, abs=4 / math.sqrt(12 * 300_000))
    assert noise.var().item() == pytest.approx(1 / 12, rel=0.01)
    assert torch.corrcoef(torch.stack([noise, values.double()]))[0, 1].abs() < 0.01
    assert torch.equal(result, dequantize(values, 17, generator(2)))
    assert not torch.equal(result, dequantize(values, 17, generator(3)))


def test_dequantize_refuses_what_is_no_pixel():
    pixels = digits()[0]
    for wrong, levels in [
        (pixels, 16),
        (pixels / 16, 17),
        (pixels - 1, 17),
        (pixels + math.nan, 17),
    ]:
        with pytest.raises(ValueError, match=f"expected integers 0 to {levels - 1}, got"):
            dequantize(wrong, levels)
    assert dequantize(pixels[:0], 17).shape == (0, 8, 8)


def test_split_divides_without_loss_or_repetition():
    parts = split(1797, (1293, 144, 360), seed=0)
    assert [len(part) for part in parts] == [1293, 144, 360]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1797))
    assert all(
        torch.equal(a, b) for a, b in zip(parts, split(1797, (1293, 144, 360), seed=0), strict=True)
    )
    assert not torch.equal(parts[1], split(1797, (1293, 144, 360), seed=1)[1])
    assert abs(parts[1].double().mean() - 898) < 150  # shuffled: not the first or the last 144
    for sizes in [(1000, 796), (1000, 798), (1800, -3), ()]:
        with pytest.raises(ValueError, match="add up to 1797"):
            split(1797, sizes, seed=0)


# --- Photographs ---


def test_photographs_are_those_of_the_libraries_and_need_no_network(no_network):
    import skimage.data

    pictures = photographs()
    assert list(pictures) == ["china", "flower", "astronaut", "chelsea", "coffee", "rocket"]
    for name, picture in pictures.items():
        peer = (
            load_sample_image(f"{name}.jpg")
            if name in ("china", "flower")
            else getattr(skimage.data, name)()
        )
        assert picture.dtype == torch.uint8 and torch.equal(picture, torch.tensor(peer)), name


def test_a_missing_photograph_is_named(monkeypatch):
    monkeypatch.setitem(data.PHOTOGRAPHS, "skimage.data", ("sunset.png",))
    with pytest.raises(DataError, match="sunset.png in .*skimage"):
        photographs()
