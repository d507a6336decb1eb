"""The decoder is Llama, its parts can be exchanged, and packing or caching changes nothing."""

import copy
import math
import pickle
import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from noise2tokens import transformer
from noise2tokens.transformer import (
    Attention,
    Config,
    Decoder,
    KVCache,
    Layout,
    SwiGLU,
    attend,
    count_parameters,
    generate,
    next_token_loss,
    rotary,
    rotate,
    sample,
    sequence_ids,
    training_flops,
)

CONFIGS = {
    "grouped": Config(37, 32, 2, 4, kv_heads=2, hidden=56),
    "multi-query": Config(19, 18, 3, 3, kv_heads=1, hidden=23, rope_base=100.0, norm_eps=1e-6),
    "multi-head": Config(11, 20, 1, 2, hidden=7, rope_base=500_000.0, norm_eps=1e-2),
    "one head, tied": Config(29, 6, 2, 1, hidden=31, tie_embeddings=True),
    "grouped, tied": Config(5, 24, 2, 6, kv_heads=2, rope_base=50.0, tie_embeddings=True),
}
ERRORS = (
    ValueError,
    TypeError,
)  # jaxtyping, which is on in tests, may see it first, with a TypeError


def make(config, seed=0, scale=8.0, dtype=torch.float64, **parts):
    """A model whose weights are large enough that attention is far from uniform, and whose norms are not all ones."""
    torch.manual_seed(seed)
    model = Decoder(config, **parts).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(
                torch.randn_like(weight) * 0.3 + 1 if weight.dim() == 1 else weight * scale
            )
    return model


def tokens_for(config, *shape, seed=0):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    return make(CONFIGS[request.param])


@pytest.fixture
def small():
    return make(CONFIGS["grouped"])


class Angles64(nn.Module):
    """Llama's angles in float64, from complex powers: transformers computes them in float32 whatever the model is."""

    def __init__(self, config):
        super().__init__()
        self.dim, self.base = config.head_dim, config.rope_base

    def forward(self, x, position_ids):
        turns = torch.tensor(
            [1 / self.base ** (2 * i / self.dim) for i in range(self.dim // 2)] * 2,
            dtype=torch.float64,
        )
        unit = torch.polar(torch.ones(()).double(), position_ids[..., None].double() * turns)
        return unit.real, unit.imag


def llama(ours: Decoder, double: bool) -> LlamaForCausalLM:
    """transformers' model with our weights; its norm and angles in float64 where asked for."""
    config = ours.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    theirs.to(next(ours.parameters()).dtype).eval()
    missing = theirs.load_state_dict(renamed(ours.state_dict()), strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    if double:
        theirs.model.rotary_emb = Angles64(config)
        for module in theirs.modules():
            if isinstance(module, modeling_llama.LlamaRMSNorm):
                module.forward = partial(norm64, module)
    return theirs


def norm64(module, x):
    """LlamaRMSNorm without its passage through float32."""
    return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


def renamed(state):
    """Our names to those of transformers."""
    names = {
        "embedding": "model.embed_tokens",
        "blocks": "model.layers",
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "feed_forward.": "mlp.",
        "gate": "gate_proj",
        "up": "up_proj",
        "down": "down_proj",
        "head": "lm_head",
    }
    result = {}
    for name, value in state.items():
        parts = name
        for ours, theirs in names.items():
            if ours in ("gate", "up", "down"):
                parts = parts.replace(f".{ours}.", f".{theirs}.")
            elif parts.startswith(ours) or f".{ours}" in parts:
                parts = parts.replace(ours, theirs, 1)
        result["model." + parts if parts.startswith("norm") else parts] = value
    return result


def test_logits_and_gradients_are_those_of_transformers(model):
    theirs = llama(model, double=True)
    tokens, targets = tokens_for(model.config, 3, 13), tokens_for(model.config, 3, 13, seed=1)
    logits, reference = model(tokens), theirs(tokens).logits
    assert reference.std() > 0.1
    assert (logits - reference).abs().max() <= 1e-10
    next_token_loss(logits, targets).backward()
    log_probs = reference.log_softmax(-1).gather(-1, targets[..., None])
    (-log_probs.mean()).backward()
    gradients = renamed({name: weight.grad for name, weight in model.named_parameters()})
    expected = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-6, name
        assert (gradient - expected[name]).abs().max() <= 1e-10, name


def test_in_single_precision_no_worse_than_transformers(model):
    tokens = tokens_for(model.config, 2, 64)
    reference = llama(model, double=True)(tokens).logits
    single = copy.deepcopy(model).float()
    ours = (single(tokens) - reference).abs().max()
    theirs = (llama(single, double=False)(tokens).logits - reference).abs().max()
    assert ours <= 2 * theirs + 2 * torch.finfo(torch.float32).eps * reference.abs().max()


def test_greedy_generation_is_that_of_transformers(model):
    prompt = tokens_for(model.config, 3, 5)
    expected = llama(model, double=True).generate(
        prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt)
    )
    assert torch.equal(generate(model, prompt, 12), expected)


def test_rotary_angles_stay_exact_far_out():
    at = torch.tensor([0, 1, 7, 100_000])
    cos, sin = rotary(at, 6, 10_000.0)
    for i in range(3):
        for row, position in enumerate(at.tolist()):
            angle = position * 10_000.0 ** (-2 * i / 6)
            assert cos[row, i].item() == pytest.approx(math.cos(angle), abs=1e-9)
            assert sin[row, i].item() == pytest.approx(math.sin(angle), abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 100_000), st.integers(1, 8))
def test_rotated_products_depend_on_the_distance_alone(a, b, shift, pairs):
    generator = torch.Generator().manual_seed(a)
    q, k = torch.randn(2, 1, 2 * pairs, generator=generator, dtype=torch.float64)

    def product(at, to):
        return (turn(q, at) * turn(k, to)).sum()

    def turn(x, at):
        return rotate(x, *rotary(torch.tensor([at]), 2 * pairs, 1000.0))

    assert torch.allclose(product(a, b), product(a + shift, b + shift), atol=1e-9)
    assert torch.allclose(turn(q, a).norm(), q.norm())
    if a != b:
        assert not torch.allclose(turn(q, a), turn(q, b))


def test_a_token_changes_no_earlier_logits_and_all_later_ones(model):
    tokens = tokens_for(model.config, 1, 9)
    for t in range(9):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % model.config.vocab_size
        moved = (model(changed) - model(tokens))[0].abs().amax(-1)
        assert (moved[:t] == 0).all() and (moved[t:] > 1e-8).all()


def test_cached_chunks_equal_the_full_forward(model):
    tokens = tokens_for(model.config, 2, 17)
    full = model(tokens)
    for chunks in ([17], [1] * 17, [5, 1, 1, 7, 3], [16, 1], [1, 16]):
        for capacity in (0, 3, 17, 40):
            cache = model.new_cache(capacity)
            with torch.no_grad():
                parts = [model(part, cache=cache) for part in tokens.split(chunks, 1)]
            assert (torch.cat(parts, 1) - full).abs().max() <= 1e-10
            assert [layer.length for layer in cache] == [17] * model.config.layers


@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_nothing_had_been_drafted(model):
    tokens, draft = tokens_for(model.config, 2, 12), tokens_for(model.config, 2, 5, seed=7)
    cache = model.new_cache()
    model(tokens[:, :8], cache=cache)
    rejected = model(torch.cat([tokens[:, 8:9], draft], 1), cache=cache)
    for layer in cache:
        layer.crop(9)
    resumed = model(tokens[:, 9:], cache=cache)
    full = model(tokens)
    assert (rejected[:, :1] - full[:, 8:9]).abs().max() <= 1e-10
    assert (resumed - full[:, 9:]).abs().max() <= 1e-10


def test_positions_can_be_given(small):
    tokens = tokens_for(small.config, 2, 6)
    full = small(tokens)
    # Rotary attention knows distances only, so that all may shift, each row by itself.
    shifted = torch.stack([torch.arange(6) + 3, torch.arange(6) + 50])
    for positions in (torch.arange(6), torch.arange(6) + 1000, shifted, shifted[:1].expand(2, 6)):
        assert (small(tokens, positions) - full).abs().max() <= 1e-10
    assert (small(tokens, 2 * torch.arange(6)) - full).abs().max() > 1e-3
    stretched = small(tokens, torch.stack([torch.arange(6), 2 * torch.arange(6)]))
    assert (stretched[0] - full[0]).abs().max() <= 1e-10
    assert (stretched[1] - small(tokens, 2 * torch.arange(6))[1]).abs().max() <= 1e-10
    cache = small.new_cache()
    with torch.no_grad():
        small(tokens[:, :4], 2 * torch.arange(4), cache=cache)
        rest = small(tokens[:, 4:], torch.tensor([8, 10]), cache=cache)
    assert (rest - small(tokens, 2 * torch.arange(6))[:, 4:]).abs().max() <= 1e-10


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@settings(deadline=None, max_examples=12)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(0, 99))
def test_packed_sequences_are_each_alone(lengths, seed):
    model = make(CONFIGS[sorted(CONFIGS)[seed % len(CONFIGS)]], seed)
    tokens = tokens_for(model.config, sum(lengths), seed=seed)
    targets = tokens_for(model.config, sum(lengths), seed=seed + 1)
    packed = model(tokens, cu_seqlens=offsets(lengths))
    next_token_loss(packed, targets).backward()
    gradients = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    alone = [model(part) for part in tokens.split(lengths) if len(part)]
    alone = torch.cat(alone)
    next_token_loss(alone, targets).backward()
    assert (packed - alone).abs().max() <= 1e-10
    for gradient, weight in zip(gradients, model.parameters(), strict=True):
        assert (gradient - weight.grad).abs().max() <= 1e-10
    in_a_row = model(tokens[None], cu_seqlens=offsets(lengths), max_seqlen=max(lengths))
    assert torch.equal(in_a_row[0], packed)


def test_padding_on_the_right_is_not_seen(small):
    tokens = tokens_for(small.config, 2, 10)
    padded = tokens.clone()
    padded[0, 6:] = 0
    assert torch.equal(small(padded)[0, :6], small(tokens)[0, :6])


def test_layout_says_who_sees_whom():
    at = torch.zeros(5, dtype=torch.long)
    empty = torch.zeros(1, 5, 0)
    packed = Layout(at, empty, empty, 5, offsets([2, 0, 3]))
    assert packed.mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert sequence_ids(offsets([2, 0, 3]), 5).tolist() == [0, 0, 2, 2, 2]
    continued = Layout(at[:2], empty[:, :2], empty[:, :2], 5)
    assert continued.mask.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert continued.mask is continued.mask  # one mask for all layers


def test_plain_attention_is_its_formula():
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, dim, dtype=torch.float64)
        for heads, length, dim in ((6, 4, 8), (2, 7, 8), (2, 7, 5))
    )
    layout = Layout(torch.arange(3, 7), torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), 7)
    for scale in (None, 0.7):
        out = attend(q, k, v, layout, scale)
        for head in range(6):
            scores = q[:, head] @ k[:, head // 3].mT * (scale or 8**-0.5)
            scores[:, torch.ones(4, 7).triu(4).bool()] = -math.inf
            expected = scores.softmax(-1) @ v[:, head // 3]
            assert (out[:, head] - expected).abs().max() <= 1e-12


class CountingLinear(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


class MeanAttention(nn.Module):
    """Reads the mean of what came before: no heads, and one tensor in the cache."""

    def __init__(self, config, linear):
        super().__init__()
        self.out = linear(config.width, config.width, bias=False)

    def forward(self, x_BTD, layout, cache=None):
        kept = x_BTD if cache is None else cache.append(x_BTD)[0]
        mean = kept.cumsum(1) / torch.arange(1, kept.shape[1] + 1)[:, None]
        return self.out(mean[:, -x_BTD.shape[1] :])


class TwoExperts(nn.Module):
    """Each token goes to one of two experts, as in a mixture of experts."""

    def __init__(self, config, linear):
        super().__init__()
        self.router = nn.Parameter(torch.empty(2, config.width))
        self.experts = nn.ModuleList(SwiGLU(config, linear) for _ in range(2))

    def forward(self, x_BTD):
        scores = (x_BTD @ self.router.T).softmax(-1)
        out = torch.stack([expert(x_BTD) for expert in self.experts], -1)
        return (out * F.one_hot(scores.argmax(-1), 2)[..., None, :] * scores[..., None, :]).sum(-1)


def test_every_linear_map_between_embedding_and_head_is_exchanged():
    config = CONFIGS["grouped"]
    model = make(config, linear=CountingLinear)
    CountingLinear.calls = 0
    tokens = tokens_for(config, 2, 5)
    assert torch.equal(model(tokens), make(config)(tokens))
    assert CountingLinear.calls == 7 * config.layers
    assert type(model.head) is nn.Linear
    other = make(config, linear=CountingLinear, attention=MeanAttention, feed_forward=TwoExperts)
    CountingLinear.calls = 0
    other(tokens)
    assert CountingLinear.calls == (1 + 6) * config.layers


def test_other_attentions_and_feed_forwards_train_and_generate():
    config = CONFIGS["multi-query"]
    model = make(config, attention=MeanAttention, feed_forward=[SwiGLU, TwoExperts, TwoExperts])
    kinds = [type(block.feed_forward) for block in model.blocks]
    assert kinds == [SwiGLU, TwoExperts, TwoExperts]
    assert all(type(block.attention) is MeanAttention for block in model.blocks)
    tokens = tokens_for(config, 2, 9)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split([4, 1, 4], 1)]
    assert (torch.cat(parts, 1) - model(tokens)).abs().max() <= 1e-10
    next_token_loss(model(tokens), tokens).backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.parameters())
    assert generate(model, tokens, 3).shape == (2, 12)
    with pytest.raises(ValueError, match="3 parts, got 2"):
        Decoder(config, attention=[MeanAttention] * 2)
    with pytest.raises(ValueError, match="3 parts, got 4"):
        Decoder(config, feed_forward=[SwiGLU] * 4)


def test_the_core_of_attention_is_exchanged_and_is_told_the_layout():
    seen = []

    def core(q, k, v, layout, scale=None):
        seen.append((q.shape, k.shape, v.shape, layout))
        return attend(q, k, v, layout, scale)

    config = CONFIGS["grouped"]
    model = make(config, attention=partial(Attention, core=core))
    tokens = tokens_for(config, 9)
    assert torch.equal(
        model(tokens, cu_seqlens=offsets([4, 5])),
        make(config)(tokens, cu_seqlens=offsets([4, 5])),
    )
    q, k, v, layout = seen[-1]
    assert (q, k, v) == ((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8))
    assert layout.max_seqlen == 5 and layout.cu_seqlens.tolist() == [0, 4, 9] and layout.keys == 9
    assert layout.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert layout is seen[-2][-1]  # the same for all layers
    model(tokens, cu_seqlens=offsets([4, 5]), max_seqlen=7)
    assert seen[-1][-1].max_seqlen == 7
    model(tokens)
    assert seen[-1][-1].max_seqlen is None and seen[-1][-1].cu_seqlens is None
    # Angles are never rounded to half precision, nor is a double-precision model given less.
    for dtype, angles in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model.to(dtype)(tokens)
        assert seen[-1][-1].cos.dtype == seen[-1][-1].sin.dtype == angles


@torch.no_grad()
def test_masks_are_made_only_where_they_say_something(small):
    """A mask keeps PyTorch from its fastest kernels, and needs T S bytes."""
    layouts = []
    for block in small.blocks:
        block.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[1]))
    tokens, cache = tokens_for(small.config, 1, 9), small.new_cache()
    small(tokens)
    small(tokens, cache=cache)
    small(tokens[:, :1], cache=cache)
    assert not any("mask" in vars(layout) for layout in layouts)
    small(tokens[:, :2], cache=cache)
    assert layouts[-1].mask.shape == (2, 12) and layouts[-1] is layouts[-2]


def test_the_rotary_angles_are_exchanged(small):
    config = small.config
    other = make(config, rope=partial(rotary, dim=config.head_dim, base=77.0))
    tokens = tokens_for(config, 2, 9)
    same = make(Config(37, 32, 2, 4, kv_heads=2, hidden=56, rope_base=77.0))
    assert torch.equal(other(tokens), same(tokens))
    assert (other(tokens) - small(tokens)).abs().max() > 1e-3


def test_embeddings_in_and_hidden_states_out(small):
    tokens = tokens_for(small.config, 2, 6)
    states = []
    hook = small.blocks[-1].register_forward_hook(lambda *event: states.append(event[-1]))
    logits = small(tokens)
    hook.remove()
    x = small.hidden(small.embedding(tokens))
    assert torch.equal(x, states[0])  # before the last norm
    assert torch.equal(small.logits(x), logits)
    assert torch.equal(small.logits(small.hidden(small.embedding(tokens[1]))), small(tokens[1]))
    embeddings = small.embedding(tokens).detach()
    prompt = torch.zeros_like(tokens)
    drawn = generate(small, prompt, 5, embeddings=embeddings)
    assert torch.equal(drawn[:, 6:], generate(small, tokens, 5)[:, 6:])
    assert torch.equal(drawn[:, :6], prompt)


@torch.no_grad()
def test_generation_stops_row_by_row(small):
    prompt = tokens_for(small.config, 4, 3)
    free = generate(small, prompt, 20)
    for stop in free[:, 3:].unique().tolist():
        stopped = generate(small, prompt, 20, stop=stop)
        longest = 0
        for row, free_row in zip(stopped[:, 3:].tolist(), free[:, 3:].tolist(), strict=True):
            first = free_row.index(stop) if stop in free_row else 20
            longest = max(longest, min(first + 1, 20))
            expected = free_row[:first] + [stop] * (len(row) - first)
            assert row == expected[: len(row)]
        assert stopped.shape[1] == 3 + longest
    assert torch.equal(free[:, :3], prompt)
    assert generate(small, prompt, 1).shape == (4, 4)


def test_generation_keeps_its_promise_about_memory(small, monkeypatch):
    caches = []
    new_cache = small.new_cache
    monkeypatch.setattr(
        small, "new_cache", lambda size: caches.append((size, new_cache(size))) or caches[-1][1]
    )
    out = generate(small, tokens_for(small.config, 2, 5), 7)
    size, cache = caches[0]
    assert out.shape == (2, 12) and size == 11  # the last token is never read
    assert all(layer.length == layer.capacity == 11 for layer in cache)


def test_sampling_follows_the_softmax():
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.9]])
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3), (1.0, 1), (1.0, 4)):
        drawn = sample(logits.expand(n, 4), temperature, top_k, generator)
        weights = (logits[0] / temperature).exp()
        if top_k is not None:
            weights[logits[0].argsort(descending=True)[top_k:]] = 0
        expected = weights / weights.sum()
        spread = (expected * (1 - expected) / n).sqrt()
        assert ((drawn.bincount(minlength=4) / n - expected).abs() <= 5 * spread).all()
    assert sample(logits).tolist() == [2]
    # Of equal logits no more than k are drawn from.
    assert len(sample(torch.zeros(500, 6), 1.0, 2, generator).unique()) == 2


def test_sampled_generation_is_fixed_by_its_generator(small):
    prompt = tokens_for(small.config, 2, 4)

    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return generate(small, prompt, 15, generator=generator, **options)

    assert torch.equal(draw(0, temperature=1.0), draw(0, temperature=1.0))
    assert not torch.equal(draw(0, temperature=1.0), draw(1, temperature=1.0))
    assert torch.equal(draw(0, temperature=1.0, top_k=1), generate(small, prompt, 15))
    assert not torch.equal(draw(0, temperature=5.0), draw(0, temperature=0.1))
    assert not torch.equal(draw(0, temperature=5.0, top_k=2), draw(0, temperature=5.0))


def test_initial_weights_have_the_stated_spread():
    torch.manual_seed(0)
    for layers in (1, 8):
        model = Decoder(Config(300, 96, layers, 4))
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                assert (weight == 1).all(), name
                continue
            residual = "attention.out" in name or "feed_forward.down" in name
            std = 0.02 / math.sqrt(2 * layers) if residual else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(weight.mean().item()) < std / 10, name
    tokens = tokens_for(model.config, 8, 64)
    assert next_token_loss(model(tokens), tokens).item() == pytest.approx(math.log(300), abs=0.1)


def test_loss_is_the_mean_over_what_is_not_ignored():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 4, -100], [2, -100, 1]])
    picked = [
        logits[b, t].log_softmax(0)[targets[b, t]] for b, t in ((0, 0), (0, 1), (1, 0), (1, 2))
    ]
    assert next_token_loss(logits, targets).item() == pytest.approx(-sum(picked).item() / 4)
    assert next_token_loss(logits, targets).dtype == torch.float64
    assert next_token_loss(logits.bfloat16(), targets).dtype == torch.float32
    assert next_token_loss(logits[0], targets[0]).shape == ()


def test_parameters_are_counted_without_memory():
    with torch.device("meta"):
        model = Decoder(Config(128_256, 4096, 32, 32, kv_heads=8, hidden=14336))
    counts = count_parameters(model)
    assert counts == {"embedding": 525_336_576, "layers": 6_979_588_096, "head": 525_336_576}
    assert sum(counts.values()) == 8_030_261_248  # Llama 3 8B
    tied = Decoder(CONFIGS["one head, tied"])
    assert count_parameters(tied)["head"] == 0
    assert sum(count_parameters(tied).values()) == sum(w.numel() for w in tied.parameters())


@pytest.mark.parametrize("name", ["grouped", "one head, tied"])
def test_operations_are_those_that_pytorch_counts(name):
    model = make(CONFIGS[name], dtype=torch.float32)
    tokens = tokens_for(model.config, 2, 12)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    assert 3 * counter.get_total_flops() == training_flops(model, 12) * tokens.numel()


def test_default_sizes():
    config = Config(256, 128, 2, 4)
    assert (config.kv_heads, config.hidden, config.head_dim) == (4, 352, 32)
    assert 8 * 128 / 3 <= config.hidden < 8 * 128 / 3 + 16
    assert Config(256, 96, 2, 4).hidden == 256  # nothing to round


def test_it_learns_and_survives_copies(small):
    """A few steps of training: to predict the token that went before."""
    model = Decoder(Config(8, 32, 2, 4, kv_heads=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        tokens = torch.randint(8, (16, 12), generator=generator)
        loss = next_token_loss(model(tokens)[:, 1:], tokens[:, :-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again(tokens), model(tokens))
    tied = pickle.loads(pickle.dumps(copy.deepcopy(make(CONFIGS["grouped, tied"]))))
    assert tied.head.weight is tied.embedding.weight


@pytest.mark.parametrize("packed", [False, True])
def test_runs_in_bfloat16(small, packed):
    tokens = tokens_for(small.config, 24) if packed else tokens_for(small.config, 2, 24)
    where = {"cu_seqlens": offsets([5, 1, 18])} if packed else {}
    reference = small(tokens, **where)
    model = copy.deepcopy(small).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, **where)
        loss = next_token_loss(logits, tokens)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    error = (logits.double() - reference).abs().max()
    whole = copy.deepcopy(small).bfloat16()(tokens, **where)
    assert whole.dtype == torch.bfloat16
    plain = llama(copy.deepcopy(small).bfloat16(), double=False)
    if not packed:
        peer = (plain(tokens).logits.double() - reference).abs().max()
        assert error <= 2 * peer and (whole.double() - reference).abs().max() <= 2 * peer
    assert error < 0.1 * reference.std()


@torch.no_grad()
def test_caches_in_bfloat16_hold_bfloat16(small):
    tokens = tokens_for(small.config, 2, 9)
    model, cache = copy.deepcopy(small).float(), small.new_cache()
    with torch.autocast("cpu", torch.bfloat16):
        parts = [model(part, cache=cache) for part in tokens.split([4, 1, 4], 1)]
        full = model(tokens)
    kept = cache[0].append(*(torch.zeros(2, 2, 0, 8, dtype=torch.bfloat16) for _ in range(2)))
    assert kept[0].shape == (2, 2, 9, 8)
    assert (torch.cat(parts, 1) - full).abs().max() < 0.05 * full.std()


def test_a_cache_keeps_what_it_was_given():
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 20, 3, generator=generator)
    rope = torch.randn(2, 20, 5, generator=generator)
    cache, reserved = KVCache(4), []
    for start, stop in ((0, 2), (2, 2), (2, 4), (4, 5), (5, 11), (11, 20)):
        kept = cache.append(latent[:, start:stop], rope[:, start:stop])
        assert cache.length == stop
        assert torch.equal(kept[0], latent[:, :stop]) and torch.equal(kept[1], rope[:, :stop])
        reserved.append(cache.capacity)
    assert reserved == [4, 4, 4, 8, 16, 32]
    # Within what is reserved nothing moves.
    cache.crop(0)
    places = {cache.append(latent[:, :8], rope[:, :8])[0].data_ptr() for _ in range(4)}
    assert len(places) == 1 and cache.length == cache.capacity == 32
    cache.crop(0)
    cache.append(latent, rope)
    cache.crop(7)
    kept = cache.append(rope[:, :1, :3], latent[:, :1].repeat(1, 1, 2)[..., :5])
    assert cache.length == 8 and torch.equal(kept[0][:, :7], latent[:, :7])
    assert torch.equal(kept[0][:, 7:], rope[:, :1, :3])
    cache.crop(0)
    assert cache.append(latent[:, :1], rope[:, :1])[0].shape == (2, 1, 3)


def test_a_cache_refuses_what_does_not_continue_it():
    cache, x = KVCache(), torch.zeros(2, 3, 4, 5)
    cache.append(x, x)
    for new in (
        (x,),
        (x, x, x),
        (x[:1], x[:1]),
        (x[..., :4], x),
        (x.double(), x.double()),
        (x[:, :, :1], x),
        (x[0], x[0]),
    ):
        with pytest.raises(ERRORS):
            cache.append(*new)
        assert cache.length == 4
    for length in (-1, 5):
        with pytest.raises(ValueError, match="can keep 0 to 4"):
            cache.crop(length)
    with pytest.raises(ERRORS):
        KVCache().append()
    with pytest.raises(ValueError, match="capacity"):
        KVCache(-1)


def test_a_cache_refuses_gradients(small):
    tokens = tokens_for(small.config, 1, 4)
    with pytest.raises(RuntimeError, match="no_grad"):
        small(tokens, cache=small.new_cache())
    with torch.no_grad():
        small(tokens, cache=small.new_cache())
    small.requires_grad_(False)
    small(tokens, cache=small.new_cache())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"width": -8}, "width"),
        ({"layers": 0}, "layers"),
        ({"heads": 0}, "heads"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"kv_heads": 3}, "divide"),
        ({"kv_heads": 8}, "divide"),
        ({"heads": 3, "kv_heads": 3}, "even"),
        ({"width": 12}, "even"),
        ({"hidden": 0}, "hidden"),
        ({"rope_base": 0.0}, "rope_base"),
        ({"rope_base": math.nan}, "rope_base"),
        ({"norm_eps": -1e-6}, "norm_eps"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"vocab_size": 9, "width": 16, "layers": 1, "heads": 4, "kv_heads": 2} | sizes)


BAD_LAYOUTS = {
    "embeddings (T, 32) or (B, T, 32) of one or more tokens, got (2, 0, 32)": {"shape": (2, 0, 32)},
    "got (0, 32)": {"shape": (0, 32)},
    "got (2, 3, 31)": {"shape": (2, 3, 31)},
    "got (1, 2, 3, 32)": {"shape": (1, 2, 3, 32)},
    "got (32,)": {"shape": (32,)},
    "positions must be (6) or (2, 6), got (5,)": {"positions": torch.arange(5)},
    "got (3, 6)": {"positions": torch.zeros(3, 6)},
    "positions must be (6) or (1, 6)": {"shape": (6, 32), "positions": torch.zeros(2, 6)},
    "need 2 caches of as many tokens each, got [0]": {"cache": [KVCache()]},
    "got [1, 0]": {"cache": [KVCache(), KVCache()]},
    "max_seqlen belongs to cu_seqlens": {"max_seqlen": 6},
    "one row, got 2": {"cu_seqlens": offsets([6])},
    "cannot continue a cache": {"cu_seqlens": offsets([6]), "cache": [KVCache(), KVCache()]},
    "must be int32, got torch.int64": {"cu_seqlens": offsets([6]).long()},
    "two or more offsets, got (1,)": {"cu_seqlens": offsets([])},
    "offsets, got (1, 2)": {"cu_seqlens": offsets([6])[None]},
    "run from 0 to 6": {"cu_seqlens": offsets([2, 3])},
    "got [0, 2, 7] and None": {"cu_seqlens": offsets([2, 5])},
    "got [0, 5, 3, 6]": {"cu_seqlens": offsets([5, -2, 3])},
    "got [1, 6]": {"cu_seqlens": torch.tensor([1, 6]).int()},
    "got [0, 2, 6] and 3": {"cu_seqlens": offsets([2, 4]), "max_seqlen": 3},
}


@pytest.mark.parametrize("message", BAD_LAYOUTS)
def test_bad_layouts_are_refused(message):
    wrong = dict.fromkeys(("positions", "cu_seqlens", "max_seqlen", "cache")) | BAD_LAYOUTS[message]
    packed = wrong["cu_seqlens"] is not None and "one row" not in message
    x = torch.zeros(wrong.pop("shape", (6, 32) if packed else (2, 6, 32)))
    if "[1, 0]" in message:
        wrong["cache"][0].append(torch.zeros(2, 2, 1, 8))
    # called directly, since the checker of shapes, which is on in tests only, would see some of these first
    with pytest.raises(TypeError if "int32" in message else ValueError, match=re.escape(message)):
        transformer._check(CONFIGS["grouped"], x, **wrong)


def test_bad_calls_are_refused(small):
    tokens = tokens_for(small.config, 2, 6)
    for message, call in {
        "37 tokens, got": lambda: small(tokens + 31),
        "37 tokens, got .* to 37": lambda: small(tokens + 37 - tokens.max()),
        "tokens, got .* to -1": lambda: small(tokens - tokens.max() - 1),
        "one or more tokens": lambda: small(tokens[:, :0]),
        "max_seqlen belongs": lambda: small(tokens, max_seqlen=6),
        "one row, got 2": lambda: small(tokens, cu_seqlens=offsets([6])),
        "need 2 caches": lambda: small(tokens, cache=small.new_cache()[1:]),
        "need n > 0": lambda: generate(small, tokens, 0),
        "one or more": lambda: generate(small, tokens[:, :0], 3),
        "temperature": lambda: generate(small, tokens, 3, temperature=-1.0),
        "finite temperature": lambda: generate(small, tokens, 3, temperature=math.inf),
        "top_k must be 1 to 37": lambda: generate(small, tokens, 3, temperature=1.0, top_k=0),
        "top_k": lambda: generate(small, tokens, 3, temperature=1.0, top_k=38),
        "37 tokens": lambda: generate(small, tokens, 3, stop=37),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    x = small.embedding(tokens)
    for call in (
        lambda: small(tokens, torch.arange(5)),
        lambda: small(tokens[None]),
        lambda: generate(small, tokens, 3, embeddings=x[:, 1:]),
    ):
        with pytest.raises(ERRORS):
            call()


def test_a_batch_may_be_empty_and_memory_in_any_order(small):
    assert small(tokens_for(small.config, 0, 5)).shape == (0, 5, 37)
    tokens = tokens_for(small.config, 7, 3).T
    assert torch.equal(small(tokens), small(tokens.contiguous()))
