"""What a cache costs in loss and time: four kinds of attention at equal size, trained on code and timed at decoding."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from noise2tokens.benchmark import compare
from noise2tokens.mla.attention import LatentAttention, Sizes, latent_decoder
from noise2tokens.mla.cost import WeighedCache
from noise2tokens.mla.rope import yarn_frequencies
from noise2tokens.text import Bytes, bits_per_byte, corpus, split_files, validation_windows, windows
from noise2tokens.training import fit, seed_everything
from noise2tokens.transformer import (
    Attention,
    Config,
    Decoder,
    KVCache,
    Layout,
    count_parameters,
    next_token_loss,
    rotary,
)


def variants(width: int, layers: int, heads: int) -> dict[str, Decoder]:
    """Make a decoder of bytes with each kind of attention; feed-forward networks make up for what differs in size.

    The latent has two heads' width (2 K) and the rotary key half a head's (K / 2): 2.5 K a token and layer, between
    MQA's 2 K and the 4 K of two groups.
    """
    dim, hidden = width // heads, 4 * width
    sizes = Sizes(2 * dim, dim, dim // 2, dim)

    def grouped(groups: int, hidden: int) -> Decoder:
        return Decoder(
            Config(Bytes().vocab_size, width, layers, heads, kv_heads=groups, hidden=hidden)
        )

    def latent(hidden: int) -> Decoder:
        return latent_decoder(
            Config(Bytes().vocab_size, width, layers, heads, hidden=hidden), sizes
        )

    kinds = {"MHA": partial(grouped, heads), "GQA, 2 groups": partial(grouped, 2)}
    kinds |= {"MQA": partial(grouped, 1), "MLA": latent}
    with torch.device("meta"):
        counts = {name: count_parameters(make(hidden))["layers"] for name, make in kinds.items()}
    each = 3 * width * layers  # numbers for one hidden unit in all layers
    return {
        name: make(hidden + round((counts["MHA"] - counts[name]) / each))
        for name, make in kinds.items()
    }


class NoAttention(nn.Module):
    """In place of attention: no token reads anything from another. Adds zeros to the stream."""

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], layout: Layout, cache: KVCache | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return zeros."""
        return torch.zeros_like(x_BTD)


def without_attention(width: int, layers: int, heads: int) -> dict[str, Decoder]:
    """Make a decoder as large as those of `variants` whose tokens do not see one another: what context is worth."""
    hidden = 4 * width + round(
        4 * width / 3
    )  # four matrices of attention in three of the feed-forward network
    config = Config(Bytes().vocab_size, width, layers, heads, hidden=hidden)
    return {"no attention": Decoder(config, attention=lambda config, linear: NoAttention())}


def measure_cache(model: Decoder, tokens: int = 8) -> int:
    """Return the bytes that one token takes in a model's cache, measured."""
    cache = [WeighedCache() for _ in model.blocks]
    device = model.embedding.weight.device
    with torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long, device=device), cache=cache)
    return sum(layer.nbytes for layer in cache) // tokens


def train_variants(
    device: torch.device,
    seed: int,
    *,
    width: int,
    layers: int,
    heads: int,
    length: int,
    batch: int,
    steps: int,
    learning_rate: float,
    windows_held_out: int,
    kinds: Callable[[int, int, int], dict[str, Decoder]] = variants,
) -> dict[str, dict[str, Any]]:
    """Train each of the models that `kinds` makes once, on the same windows in the same order.

    Returns:
        By kind: "bits" a byte of files that were not trained on, "parameters", "bytes" in the cache a token, "curve" of
        training losses in nats.
    """
    seed_everything(seed)
    train_files, test_files = split_files(corpus())
    tokens = Bytes()
    stream, held_out = (
        torch.cat([tokens.encode(text) for text in files.values()]).to(device)
        for files in (train_files, test_files)
    )
    inputs, targets = validation_windows(held_out, length, windows_held_out)
    found = {}
    for name, model in kinds(width, layers, heads).items():
        seed_everything(seed)
        model.to(device).initialize()
        draw = windows(stream, length, torch.Generator(device).manual_seed(seed))
        history = fit(
            model,
            lambda pair, model=model: next_token_loss(model(pair[0]), pair[1]),
            draw,
            steps=steps,
            batch_size=batch,
            learning_rate=learning_rate,
            warmup=0.1,
            label=name,
        )
        with torch.no_grad():
            loss = next_token_loss(model(inputs), targets).item()
        found[name] = {
            "bits": bits_per_byte(loss, targets, tokens),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "bytes": measure_cache(model),
            "curve": history.losses,
        }
    return found


def several_seeds(
    device: torch.device, seed: int, seeds: int, **training: Any
) -> dict[str, dict[str, Any]]:
    """Call `train_variants` with successive seeds; "bits" becomes a list with one value for each."""
    runs = [train_variants(device, seed + i, **training) for i in range(seeds)]
    return {
        name: {"bits": [run[name]["bits"] for run in runs]}
        | {what: runs[0][name][what] for what in ("parameters", "bytes")}
        for name in runs[0]
    }


def one_layer(width: int, heads: int) -> dict[str, Attention | LatentAttention]:
    """Make a layer of each kind and form, with DeepSeek-V2's proportions: a latent of 4 K, a rotary key of K / 2."""
    dim = width // heads
    sizes = Sizes(4 * dim, dim, dim // 2, dim)
    config = partial(Config, 1, width, 1, heads)
    groups = {"MHA": heads, "GQA, 2 groups": 2, "MQA": 1}
    layers = {name: Attention(config(kv_heads=count)) for name, count in groups.items()}
    for absorbed in (False, True):
        name = f"MLA, {'absorbed' if absorbed else 'expanded'}"
        layers[name] = LatentAttention(config(), sizes=sizes, absorbed=absorbed)
    return layers


def decoding_step(
    layer: Attention | LatentAttention,
    keys: int,
    queries: int,
    batch: int = 1,
    device: torch.device | None = None,
) -> Callable[[], None]:
    """Make a call of a layer for new tokens that read a filled cache; it forgets them, so each call does the same.

    Args:
        layer: What is called.
        keys: Tokens in the cache before, of random content.
        queries: New tokens.
        batch: Sequences.
        device: Where; on a GPU in bfloat16.
    """
    dtype = torch.bfloat16 if device is not None and device.type == "cuda" else torch.float32
    if isinstance(layer, LatentAttention):
        rope_dim = layer.sizes.rope_dim
        shapes = [(1, layer.sizes.kv_rank + rope_dim)]
    else:
        rope_dim = layer.head_dim
        shapes = [(layer.key.weight.shape[0] // rope_dim, rope_dim)] * 2
    draw = partial(torch.randn, device=device, dtype=dtype)
    cache, x_BTD = KVCache(keys + queries), draw(batch, queries, layer.out.weight.shape[0])
    cache.append(*(draw(batch, heads, keys, dim) for heads, dim in shapes))
    positions = torch.arange(keys, keys + queries, device=device)
    cos, sin = (part[None].float() for part in rotary(positions, rope_dim, 10_000.0))
    layout = Layout(positions, cos, sin, keys + queries)
    layer.to(device, dtype)

    @torch.no_grad()
    def step() -> None:
        layer(x_BTD, layout, cache)
        cache.crop(keys)

    return step


def decoding_times(
    device: torch.device, width: int, heads: int, keys: int, batch: int, seconds: float
) -> dict[str, float]:
    """Time one decoded token in one layer after `keys` tokens, for each kind and form: milliseconds."""
    layers = one_layer(width, heads)
    calls = {name: decoding_step(layer, keys, 1, batch, device) for name, layer in layers.items()}
    timings = compare(calls, device=device, seconds=seconds, rounds=5)
    return {name: 1e3 * timing.seconds for name, timing in timings.items()}


def form_times(
    device: torch.device, width: int, heads: int, keys: int, queries: Sequence[int], seconds: float
) -> dict[str, dict[str, float]]:
    """Time both forms of latent attention for several numbers of new tokens: milliseconds, by number and form."""
    found = {}
    for count in queries:
        layers = {n: layer for n, layer in one_layer(width, heads).items() if n.startswith("MLA")}
        calls = {
            n.removeprefix("MLA, "): decoding_step(layer, keys, count, device=device)
            for n, layer in layers.items()
        }
        timings = compare(calls, device=device, seconds=seconds, rounds=5)
        found[str(count)] = {name: 1e3 * timing.seconds for name, timing in timings.items()}
    return found


def crossing(times: dict[str, dict[str, float]]) -> float | None:
    """Return the number of new tokens from which on the expanded form is faster, between those that were timed.

    The logarithm of the ratio of times is taken as linear in the logarithm of the number. None if there is none.
    """
    points = [(math.log(int(n)), math.log(t["absorbed"] / t["expanded"])) for n, t in times.items()]
    for (x, before), (right, after) in zip(points, points[1:], strict=False):
        if before < 0 <= after:
            return math.exp(x - before * (right - x) / (after - before))
    return None


TRAINING = {"width": 48, "layers": 2, "heads": 4, "length": 64, "batch": 8}
SMALL = TRAINING | {"steps": 400, "learning_rate": 2e-3, "windows_held_out": 64}

BUDGETS = {
    "long": TRAINING
    | {"width": 128, "length": 128, "batch": 16, "steps": 300, "learning_rate": 2e-3}
    | {"windows_held_out": 128, "seeds": 3, "decode_width": 512, "decode_heads": 16}
    | {"keys": (256, 2048, 16384), "decode_batch": 1, "queries": (1, 4, 16, 64, 256)}
    | {"seconds": 1.0},
    "full": TRAINING
    | {"width": 512, "layers": 8, "heads": 8, "length": 512, "batch": 32, "steps": 1500}
    | {"learning_rate": 1e-3, "windows_held_out": 64}
    | {"seeds": 3, "decode_width": 16384, "decode_heads": 128}
    | {"keys": (2048, 8192, 32768), "decode_batch": 4, "queries": (1, 16, 64, 256, 1024)}
    | {"seconds": 1.0},
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    seeds: int,
    decode_width: int,
    decode_heads: int,
    keys: tuple[int, ...],
    decode_batch: int,
    queries: tuple[int, ...],
    seconds: float,
    **training: Any,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Train the four kinds and a model without attention with several seeds, and time one layer at decoding.

    Args:
        device: Where.
        seed: The first seed.
        seeds: How many trainings of each kind.
        decode_width: Of the layer that is timed.
        decode_heads: Its heads.
        keys: Lengths of contexts.
        decode_batch: Sequences that are decoded at once.
        queries: Numbers of new tokens for which the two forms are timed, after the middle one of `keys`.
        seconds: How long each call is timed, about.
        training: As for `train_variants`.

    Returns:
        "trained": by kind "bits" for each seed, "parameters" and "bytes". "milliseconds": by length and kind. "forms":
        by number of new tokens and form.
    """
    trained = several_seeds(device, seed, seeds, kinds=without_attention, **training)
    trained |= several_seeds(device, seed, seeds, **training)
    layer = device, decode_width, decode_heads
    times = {str(n): decoding_times(*layer, n, decode_batch, seconds) for n in keys}
    forms = form_times(*layer, keys[len(keys) // 2], queries, seconds)
    results = {"trained": trained, "milliseconds": times, "forms": forms}
    pictures = {
        "Bits a byte against bytes in the cache a token, a point for each seed": plt.figure(
            figsize=(5.0, 3.2)
        ),
        "A decoded token's time in one layer against its context": plt.figure(figsize=(5.6, 3.2)),
    }
    for draw, found, figure in zip(
        (draw_trade, draw_times), (trained, times), pictures.values(), strict=True
    ):
        draw(figure.subplots(), found)
    return results, pictures


STYLE = {
    "MHA": "s-",
    "GQA, 2 groups": "^-",
    "MQA": "v-",
    "MLA, expanded": "o:",
    "MLA, absorbed": "o-",
}


def draw_times(ax, times: dict[str, dict[str, float]]) -> None:
    """Draw milliseconds against the tokens in the cache, for each kind and form."""
    for name in next(iter(times.values())):
        ax.plot(
            [int(n) for n in times], [row[name] for row in times.values()], STYLE[name], label=name
        )
    ax.set(xlabel="tokens in the cache", ylabel="ms a token", xscale="log", yscale="log")
    ax.legend(fontsize="x-small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw_trade(ax, trained: dict[str, dict[str, Any]]) -> None:
    """Draw bits a byte against bytes in the cache, a point for each seed; a line for each where there is no cache."""
    cached = {name: kind for name, kind in trained.items() if kind["bytes"]}
    for name, kind in cached.items():
        ax.plot([kind["bytes"]] * len(kind["bits"]), kind["bits"], "o", label=name)
    for name in trained.keys() - cached.keys():
        for i, bits in enumerate(trained[name]["bits"]):
            ax.axhline(bits, color="#7a7a7a", ls="--", lw=0.8, label=None if i else name)
    ax.set(xlabel="bytes in the cache a token", ylabel="bits a byte", xscale="log")
    counts = [kind["bytes"] for kind in cached.values()]
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.set_xticks([], minor=True)
    ax.legend(fontsize="x-small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw_ramp(
    ax, dim: int, base: float | int, factor: float | int, length: int, fast: int = 32, slow: int = 1
) -> None:
    """Draw YaRN's share of each pair's angle: as in DeepSeek's code, and with the ramp of YaRN's paper."""
    pairs, plain = torch.arange(dim // 2), yarn_frequencies(dim, base, 1, length)
    turns = length * plain / (2 * math.pi)
    kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
    code = yarn_frequencies(dim, base, factor, length, fast, slow)
    ax.plot(pairs, code / plain, "o-", label="linear in the pair")
    ax.plot(pairs, kept + (1 - kept) / factor, "s:", label="linear in turns")
    ax.axhline(1 / factor, color="#7a7a7a", lw=0.8)
    ax.set(xlabel="pair $j$", ylabel="angle over RoPE's")
    ax.legend(fontsize="x-small")
