"""How fast the book's code is beside the libraries that its tests hold it against: python tests/speed.py (make speed).

Each case makes two calls that do the same work, the library's and ours; `test_speed.py` checks that they do. All are
timed in one process on one thread, in alternating rounds, and what is reported is the ratio of our time to theirs.
"""

import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noise2tokens import records
from noise2tokens.benchmark import compare
from noise2tokens.ddim_ode.sampling import ddim_sample, sub_sequence
from noise2tokens.deepseek_v3 import model as deepseek_v3
from noise2tokens.deepseek_v3.config import tiny
from noise2tokens.deepseek_v3.mtp import MultiToken, speculate
from noise2tokens.distribution_transforms.distances import optimal_pairs, sliced_wasserstein
from noise2tokens.flow_vs_diffusion.cnf import draw_probe, log_likelihood
from noise2tokens.flow_vs_diffusion.diffusion import NoiseSchedule
from noise2tokens.flow_vs_diffusion.integrators import dormand_prince
from noise2tokens.fp8.gemm import fast_gemm
from noise2tokens.fp8.scaling import ROW, quantize
from noise2tokens.gradient_checkpointing.checkpoint import checkpoint, checkpoint_by_hooks
from noise2tokens.gradient_checkpointing.models import recomputing
from noise2tokens.gradient_checkpointing.schedules import equal_spans
from noise2tokens.kimi_vl.moonvit import MoonViT, VisionConfig
from noise2tokens.mla.attention import LatentAttention, Sizes
from noise2tokens.moe.experts import looped
from noise2tokens.moe.layer import MixtureOfExperts, MoEConfig, to_transformers
from noise2tokens.muon.optimizer import Muon
from noise2tokens.muon.orthogonalize import newton_schulz
from noise2tokens.networks import TimeMLP
from noise2tokens.nice import Chain
from noise2tokens.realnvp_glow.coupling import RealNVP
from noise2tokens.realnvp_glow.multiscale import glow_step, initialize
from noise2tokens.sequence_packing.experiment import arrange, decoder, functions, mean_loss
from noise2tokens.sequence_packing.layout import pad_batch
from noise2tokens.sequence_packing.patch import without_padding
from noise2tokens.transformer import (
    Config,
    Decoder,
    KVCache,
    Layout,
    generate,
    next_token_loss,
    rotary,
)
from noise2tokens.vq_vae.quantizers import FSQ, VectorQuantizer

Calls = dict[str, Callable[[], Any]]
CASES: dict[tuple[str, str], Callable[[], Calls]] = {}


def case(chapter: str, what: str, *arguments) -> Callable:
    """Register a function that makes {"library": call, "ours": call}; both return tensors or numbers that agree."""

    def register(make: Callable[..., Calls]) -> Callable[..., Calls]:
        CASES[chapter, what] = lambda: make(*arguments)
        return make

    return register


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """A step of gradient descent with Adam, which returns the loss."""
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return step


@case("01_distribution_transforms", "sliced Wasserstein distance, 2000 points in 64 dimensions")
def sliced() -> Calls:
    import ot

    x, y = torch.randn(2000, 64), 1.5 * torch.randn(2000, 64)
    return {
        "POT": lambda: ot.sliced_wasserstein_distance(x, y, n_projections=200),
        "ours": lambda: sliced_wasserstein(x, y, 200),
    }


@case("03_realnvp_glow", "RealNVP, a training step, 64 dimensions", 64, 128)
@case("03_realnvp_glow", "RealNVP, a training step, 784 dimensions", 784, 256)
def realnvp(dim: int, width: int) -> Calls:
    import normflows
    import zuko

    x = torch.randn(256, dim)
    ours = RealNVP(dim, [width, width], 6)
    theirs = zuko.flows.RealNVP(dim, transforms=6, hidden_features=(width, width), randmask=False)
    for (
        transform
    ) in theirs.transform.transforms:  # it starts from the identity, as the two others do
        nn.init.zeros_(transform.hyper[-1].weight)
        nn.init.zeros_(transform.hyper[-1].bias)
    layers = []
    for _ in range(6):
        network = normflows.nets.MLP([dim // 2, width, width, dim], init_zeros=True)
        layers += [
            normflows.flows.AffineCouplingBlock(network),
            normflows.flows.Permute(dim, "swap"),
        ]
    others = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dim), layers)
    return {
        "zuko": training_step(theirs, lambda: -theirs().log_prob(x).mean()),
        "normflows": training_step(others, lambda: others.forward_kld(x)),
        "ours": training_step(ours, lambda: -ours.log_prob(x).mean()),
    }


@case("03_realnvp_glow", "Glow, a training step of four steps of flow, 4×16×16")
def glow() -> Calls:
    import normflows

    x = torch.randn(32, 4, 16, 16)
    ours = Chain([layer for _ in range(4) for layer in glow_step((4, 16, 16), 64)])
    initialize(ours, x)
    layers = [normflows.flows.GlowBlock(4, 64, use_lu=True) for _ in range(4)]
    base = normflows.distributions.DiagGaussian((4, 16, 16), trainable=False)
    theirs = normflows.NormalizingFlow(base, layers)
    theirs.forward_kld(x)  # its normalizations start from data, too
    return {
        "normflows": training_step(theirs, lambda: theirs.forward_kld(x)),
        "ours": training_step(ours, lambda: -ours.log_prob(x).mean()),
    }


@case("04_flow_vs_diffusion", "adaptive solver, 512 points in 2 dimensions")
def adaptive() -> Calls:
    from torchdiffeq import odeint

    network, x = TimeMLP(2, width=128), torch.randn(512, 2)
    times = torch.tensor([0.0, 1.0])

    @torch.no_grad()
    def theirs() -> Tensor:
        return odeint(lambda t, y: network(y, t.expand(len(y))), x, times, rtol=1e-5, atol=1e-5)[-1]

    @torch.no_grad()
    def ours() -> Tensor:
        return dormand_prince(network, x, 0, 1).x

    return {"torchdiffeq": theirs, "ours": ours}


@case("04_flow_vs_diffusion", "likelihood of a flow, exact divergence, 2 dimensions", 2, 512, True)
@case("04_flow_vs_diffusion", "likelihood of a flow, exact divergence, 64 dimensions", 64, 64, True)
@case(
    "04_flow_vs_diffusion",
    "likelihood of a flow, Hutchinson's estimate, 64 dimensions",
    64,
    64,
    False,
)
def likelihood(dim: int, n: int, exact: bool) -> Calls:
    from torchdiffeq import odeint

    network, x = TimeMLP(dim, width=128), torch.randn(n, dim)
    probe = draw_probe(x)

    def rate(t: Tensor, state: Tensor) -> Tensor:
        with torch.enable_grad():
            y = state[:, :-1].detach().requires_grad_()
            v = network(y, t.expand(n))
            if exact:
                columns = [
                    torch.autograd.grad(v[:, i].sum(), y, retain_graph=True)[0][:, i]
                    for i in range(dim)
                ]
                divergence = torch.stack(columns).sum(0)
            else:
                divergence = (torch.autograd.grad(v, y, probe)[0] * probe).sum(1)
        return torch.cat([v.detach(), divergence[:, None]], 1)

    def theirs() -> Tensor:
        state = torch.cat([x, torch.zeros(n, 1)], 1)
        end = odeint(rate, state, torch.tensor([0.0, 1.0]), rtol=1e-5, atol=1e-5)[-1]
        z, log_det = end[:, :-1], end[:, -1]
        return -0.5 * z.square().sum(1) - dim / 2 * math.log(2 * math.pi) + log_det

    return {
        "torchdiffeq": theirs,
        "ours": lambda: log_likelihood(network, x, probe=None if exact else probe).log_prob,
    }


@case("04_flow_vs_diffusion", "optimal pairs of a batch, 512 in 2 dimensions", 512, 2)
@case("04_flow_vs_diffusion", "optimal pairs of a batch, 512 in 64 dimensions", 512, 64)
def pairs(n: int, dim: int) -> Calls:
    from torchcfm.optimal_transport import OTPlanSampler

    plan, x, y = OTPlanSampler("exact"), torch.randn(n, dim), torch.randn(n, dim)

    def cost(found: Tensor) -> float:
        return (x - y[found]).square().sum(1).mean().item()

    return {
        "torchcfm": lambda: cost(torch.from_numpy(plan.get_map(x, y).argmax(1))),
        "ours": lambda: cost(optimal_pairs(x, y)),
    }


@case("05_ddim_ode", "50 steps of DDIM, 256 samples of 64 dimensions")
def ddim() -> Calls:
    from diffusers import DDIMScheduler

    chain = NoiseSchedule.linear(1000)
    scheduler = DDIMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(50)
    network, x, steps = TimeMLP(64, width=128), torch.randn(256, 64), sub_sequence(1000, 50)

    @torch.no_grad()
    def theirs() -> Tensor:
        y = x
        for timestep in scheduler.timesteps:
            t = torch.full((256,), (timestep.item() + 1) / 1000)
            y = scheduler.step(network(y, t), timestep, y).prev_sample
        return y

    return {"diffusers": theirs, "ours": lambda: ddim_sample(network, chain, x, steps)}


@case(
    "07_vq_vae",
    "512 codes of 64 dimensions follow 8192 vectors: a step with gradient",
    8192,
    64,
    512,
)
@case(
    "07_vq_vae", "32 codes of 4 dimensions follow 1024 vectors: a step with gradient", 1024, 4, 32
)
def quantizer(n: int, dim: int, codes: int) -> Calls:
    from vector_quantize_pytorch import VectorQuantize

    z, weight = torch.randn(n, dim, requires_grad=True), torch.randn(n, dim)
    ours = VectorQuantizer(codes, dim)
    theirs = VectorQuantize(
        dim,
        codes,
        decay=0.99,
        commitment_weight=0.25,
        rotation_trick=False,
        threshold_ema_dead_code=0,
    )
    with torch.no_grad():  # they start alike, and each goes on by itself
        theirs._codebook.embed.copy_(ours.codebook[None])
        theirs._codebook.embed_avg.copy_(ours.codebook[None])

    def step(values: Tensor, loss: Tensor) -> float:
        (z.grad,) = torch.autograd.grad((values * weight).mean() + loss, z)
        return loss.item()

    def library() -> float:
        values, _, loss = theirs(z[None])
        return step(values[0], loss.squeeze())

    def own() -> float:
        values, _, loss = ours(z)
        ours.move()
        return step(values, loss)

    return {"vector-quantize-pytorch": library, "ours": own}


@case("07_vq_vae", "finite scalar quantization, 8 × 6 × 5 levels, 8192 vectors")
def finite() -> Calls:
    from vector_quantize_pytorch import FSQ as Theirs

    z = torch.randn(8192, 3)
    ours, theirs = FSQ([8, 6, 5]), Theirs([8, 6, 5])
    return {
        "vector-quantize-pytorch": lambda: theirs(z[None])[0][0],
        "ours": lambda: ours(z).values,
    }


@case("09_gradient_checkpointing", "each of 8 blocks recomputed, as a function", True)
@case("09_gradient_checkpointing", "each of 8 blocks recomputed, by hooks", False)
def recomputed(reentrant: bool) -> Calls:
    from torch.utils.checkpoint import checkpoint as torchs

    model, tokens = Decoder(Config(257, 64, 8, 4)), torch.randint(0, 256, (4, 129))

    def step(how: Callable) -> Callable[[], float]:
        def run() -> float:
            with recomputing(model, equal_spans(8, 8), how):
                loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
                loss.backward()
            model.zero_grad()
            return loss.item()

        return run

    return {
        "PyTorch": step(lambda f, *args: torchs(f, *args, use_reentrant=reentrant)),
        "ours": step(checkpoint if reentrant else checkpoint_by_hooks),
    }


def texts() -> list[Tensor]:
    """Functions of the standard library, as bytes."""
    return [tokens.clamp_max(255) for tokens in functions(1024)[100:116]]


@case("10_sequence_packing", "decoder, forward and backward, 16 texts packed")
def packed() -> Calls:
    ways, model = arrange(texts(), 2048), decoder(256, 64, 2, 4)

    def step(name: str) -> Callable[[], float]:
        def run() -> float:
            loss = mean_loss(model, ways[name])
            loss.backward()
            model.zero_grad()
            return loss.item()

        return run

    return {"the same, padded": step("padded"), "ours": step("packed")}


@case("10_sequence_packing", "small Llama, forward and backward, 16 texts without their padding")
def patched() -> Calls:
    from test_transformer import llama

    model = llama(Decoder(Config(257, 64, 2, 4)), False).float()
    tokens, mask = pad_batch(texts(), 0)
    labels = tokens.masked_fill(~mask, -100)

    def theirs() -> float:
        out = model(tokens, attention_mask=mask.long(), labels=labels, use_cache=False)
        out.loss.backward()
        model.zero_grad()
        return out.loss.item()

    def ours() -> float:
        with without_padding(model):
            loss = model(tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
        model.zero_grad()
        return loss.item()

    return {"transformers": theirs, "ours": ours}


def latent_layers(keys: int, queries: int) -> tuple[LatentAttention, Calls]:
    """A layer of latent attention, and calls of transformers' and of ours for tokens after a filled cache."""
    from test_mla import theirs_like
    from transformers import DynamicCache

    config, sizes = Config(1, 512, 1, 16, norm_eps=1e-6), Sizes(128, 32, 16, 32, query_rank=192)
    ours = LatentAttention(config, sizes=sizes)
    peer, settings = theirs_like(ours, config, sizes, 1, True)
    peer, settings._attn_implementation = peer.float(), "sdpa"
    ours_cache, their_cache = (KVCache(keys + queries), DynamicCache()) if keys else (None, None)

    def run(name: str, x: Tensor, first: int) -> Tensor:
        positions = torch.arange(first, first + x.shape[1])
        cos, sin = (part.float() for part in rotary(positions, sizes.rope_dim, config.rope_base))
        if name == "ours":
            return ours(x, Layout(positions, cos[None], sin[None], first + x.shape[1]), ours_cache)
        angles = cos.repeat(1, 2)[None], sin.repeat(1, 2)[None]
        return peer(x, angles, None, past_key_values=their_cache)[0]

    x = torch.randn(1, keys + queries, 512)
    with torch.no_grad():
        for name in ("transformers", "ours") if keys else ():
            run(name, x[:, :keys], 0)

    def call(name: str) -> Tensor:
        out = run(name, x[:, keys:], keys)
        if keys and name == "ours":
            ours_cache.crop(keys)
        elif keys:
            their_cache.crop(-queries)
        return out

    return ours, {name: partial(call, name) for name in ("transformers", "ours")}


@case("12_mla", "latent attention, forward, 256 tokens", False)
@case("12_mla", "latent attention, forward and backward, 256 tokens", True)
def latent_prompt(backward: bool) -> Calls:
    _, calls = latent_layers(0, 256)

    def step(call: Callable[[], Tensor]) -> Tensor:
        with torch.set_grad_enabled(backward):
            out = call()
            if backward:
                out.square().sum().backward()
        return out.detach()

    return {name: partial(step, call) for name, call in calls.items()}


@case("12_mla", "latent attention, a token after 1024 in the cache")
def latent_decoding() -> Calls:
    _, calls = latent_layers(1024, 1)
    return {name: partial(no_grad, call) for name, call in calls.items()}


@case("12_mla", "absorbed beside expanded, 1 token after 1024", 1)
@case("12_mla", "absorbed beside expanded, 256 tokens after 1024", 256)
def latent_forms(queries: int) -> Calls:
    ours, calls = latent_layers(1024, queries)

    def run(absorbed: bool) -> Tensor:
        ours.absorbed = absorbed
        return no_grad(calls["ours"])

    return {"expanded": partial(run, False), "ours": partial(run, True)}


def no_grad(call: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return call()


@case("13_moe", "mixture of 64 experts, forward and backward, 2048 tokens", False)
@case("13_moe", "grouped experts beside a loop, forward and backward, 2048 tokens", True)
def mixtures(looping: bool) -> Calls:
    from test_moe import peer_config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    sizes = MoEConfig(64, 6, 32, shared=2, groups=8, top_groups=4, scale=2.5)
    config, x = Config(1, 64, 1, 4), torch.randn(4, 512, 64)
    ours = MixtureOfExperts(config, sizes=sizes)
    if looping:
        other = MixtureOfExperts(config, sizes=sizes, compute=looped)
        other.load_state_dict(ours.state_dict())
    else:
        settings = peer_config(sizes, 64)
        settings._experts_implementation = "grouped_mm"  # their fastest
        other = DeepseekV3MoE(settings)
        other.load_state_dict(to_transformers(ours.state_dict()))

    def step(layer: nn.Module) -> Tensor:
        out = layer(x)
        out.backward(x)
        layer.zero_grad()
        return out.detach()

    name = "a loop over experts" if looping else "transformers"
    return {name: lambda: step(other), "ours": lambda: step(ours)}


@case("14_fp8", "product of two FP8 matrices, a scale for each row, 256×512 by 512×256")
def scaled_product() -> Calls:
    a, b = (quantize(torch.randn(256, 512), ROW) for _ in range(2))
    scales = dict(scale_a=a.scales, scale_b=b.scales.T, out_dtype=torch.float32)
    return {
        "PyTorch": lambda: torch._scaled_mm(a.values, b.values.T, **scales),
        "ours": lambda: fast_gemm(a, b),
    }


def deepseek(width: int) -> tuple[Decoder, nn.Module, Tensor]:
    """Our DeepSeek-V3 of this width, transformers' with its weights, and tokens."""
    from test_deepseek_v3 import their_config
    from transformers import DeepseekV3ForCausalLM

    config = tiny(257, predictions=0, width=width)
    ours = deepseek_v3.decoder(config).eval()
    settings = their_config(config)
    settings._attn_implementation, settings._experts_implementation = "sdpa", "grouped_mm"
    theirs = DeepseekV3ForCausalLM(settings).eval()
    theirs.load_state_dict(deepseek_v3.to_checkpoint(ours.state_dict(), config))
    return ours, theirs, torch.randint(0, 256, (8, 128))


@case("15_deepseek_v3", "DeepSeek-V3 of width 64, forward, 8×128 tokens", 64, False)
@case("15_deepseek_v3", "DeepSeek-V3 of width 64, forward and backward, 8×128 tokens", 64, True)
@case("15_deepseek_v3", "DeepSeek-V3 of width 256, forward and backward, 8×128 tokens", 256, True)
def deepseek_step(width: int, backward: bool) -> Calls:
    ours, theirs, tokens = deepseek(width)

    def step(model: nn.Module, logits: Callable[[], Tensor]) -> float:
        with torch.set_grad_enabled(backward):
            loss = next_token_loss(logits()[:, :-1], tokens[:, 1:])
        if backward:
            loss.backward()
            model.zero_grad()
        return loss.item()

    return {
        "transformers": partial(step, theirs, lambda: theirs(tokens, use_cache=False).logits),
        "ours": partial(step, ours, lambda: ours(tokens)),
    }


@case("15_deepseek_v3", "DeepSeek-V3 of width 64, 48 tokens generated with a cache", 64)
@case("15_deepseek_v3", "DeepSeek-V3 of width 256, 48 tokens generated with a cache", 256)
def deepseek_generation(width: int) -> Calls:
    ours, theirs, tokens = deepseek(width)
    prompt = tokens[:1, :64]
    options = dict(max_new_tokens=48, do_sample=False, attention_mask=torch.ones_like(prompt))
    return {
        "transformers": lambda: theirs.generate(prompt, **options),
        "ours": lambda: generate(ours, prompt, 48),
    }


@case("15_deepseek_v3", "drafts of one depth, all accepted, 64 tokens", True)
@case("15_deepseek_v3", "drafts of one depth, none accepted, 64 tokens", False)
@torch.no_grad()
def drafts(accepted: bool) -> Calls:
    model = MultiToken(tiny(257, predictions=1, width=64, layers=6)).eval()
    if accepted:  # no block adds anything, so both heads read the last token
        for name, weight in model.named_parameters():
            if name.endswith(
                (".out.weight", "experts.down", "feed_forward.down.weight", "shared.down.weight")
            ):
                weight.zero_()
        width = model.config.width
        model.depths[0].projection.weight.copy_(torch.eye(2 * width)[width:])
    prompt = torch.randint(0, 256, (1, 16))
    return {
        "plain decoding": lambda: generate(model.main, prompt, 64),
        "ours": lambda: speculate(model, prompt, 64)[0],
    }


@case("16_muon", "step of Muon, 2 layers of width 64, products in float32 beside bfloat16", None)
@case("16_muon", "step of Muon, 2 layers of width 64, products in bfloat16", torch.bfloat16)
def muon_step(dtype: torch.dtype | None) -> Calls:
    shapes = [(64, 64)] * 8 + [(171, 64)] * 4 + [(64, 171)] * 2
    pairs = []
    ours = partial(Muon, orthogonalize=partial(newton_schulz, dtype=dtype))
    for make in (partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), ours):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        pairs.append((params, make(params, lr=1e-3)))

    def step(params: list[Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in params])

    return {"PyTorch": partial(step, *pairs[0]), "ours": partial(step, *pairs[1])}


@case("17_kimi_vl", "MoonViT on eight packed pictures, forward and backward, 1024 patches")
def packed_pictures() -> Calls:
    from test_kimi_vl import their_vision_config, their_vision_names, thw
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionModel

    config = VisionConfig(96, layers=4, heads=4, hidden=256, table=16)
    ours, theirs = MoonViT(config), Kimi_K25VisionModel(their_vision_config(config))
    theirs.load_state_dict(their_vision_names(ours.state_dict(), config))
    grids = [(8, 16), (16, 8), (4, 32), (2, 64)] * 2
    patches = torch.randn(1024, 588)
    cut, sizes = patches.view(1024, 3, 14, 14), thw(grids)

    def step(model: nn.Module, run: Callable[[], Tensor]) -> Tensor:
        out = run()
        out.square().sum().backward()
        model.zero_grad()
        return out.detach()

    return {
        "transformers": lambda: step(theirs, lambda: theirs(cut, grid_thw=sizes).pooler_output),
        "ours": lambda: step(ours, lambda: ours(patches, grids)),
    }


def decoders() -> tuple[Decoder, nn.Module, Tensor]:
    """Our decoder, transformers' Llama with its weights, and tokens."""
    from test_transformer import llama

    ours = Decoder(Config(257, 128, 4, 4, kv_heads=2))
    return ours, llama(ours, False), torch.randint(0, 256, (16, 129))


@case("", "decoder of all later chapters, forward and backward, 16×128 tokens")
def decoder_step() -> Calls:
    ours, theirs, tokens = decoders()
    before, after = tokens[:, :-1], tokens[:, 1:]

    def step(model: nn.Module, logits: Callable[[], Tensor]) -> Callable[[], float]:
        def run() -> float:
            loss = next_token_loss(logits(), after)
            loss.backward()
            model.zero_grad()
            return loss.item()

        return run

    return {
        "transformers": step(theirs, lambda: theirs(before, use_cache=False).logits),
        "ours": step(ours, lambda: ours(before)),
    }


@case("", "decoder of all later chapters, 48 tokens generated with a cache, batch 2")
def decoder_generation() -> Calls:
    ours, theirs, tokens = decoders()
    prompt = tokens[:2, :16]
    options = dict(max_new_tokens=48, do_sample=False, attention_mask=torch.ones_like(prompt))
    return {
        "transformers": lambda: theirs.generate(prompt, **options),
        "ours": lambda: generate(ours, prompt, 48),
    }


def measure(device: torch.device, *, seed: int, seconds: float) -> tuple[dict[str, Any], dict]:
    """Time all cases: for each, by library, the median of our time over its time, and our milliseconds."""
    torch.set_num_threads(1)
    found = []
    for (chapter, what), make in CASES.items():
        torch.manual_seed(seed)
        calls = make()
        ours = calls.pop("ours")
        for library, call in calls.items():
            timings = compare({library: call, "ours": ours}, device=device, seconds=seconds)
            row = dict(chapter=chapter, what=what, library=library, ratio=timings["ours"].ratio)
            found.append(row | {"milliseconds": 1e3 * timings["ours"].seconds})
            print(f"{row['ratio']:6.2f}  {library:12} {what}", flush=True)
    return {"cases": found}, {}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ["NOISE2TOKENS_RECORDS"] = str(Path(__file__).parent.parent / "book")
    records.measured("speed", measure, {"long": {"seconds": 3.0}}, "long", 0)
