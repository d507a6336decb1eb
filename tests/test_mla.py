"""Latent attention is that of transformers, in both of its forms; caches have the size that formulas give."""

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from noise2tokens.mla import experiment
from noise2tokens.mla.attention import (
    V3,
    LatentAttention,
    Sizes,
    from_transformers,
    latent_decoder,
    operations,
    to_transformers,
)
from noise2tokens.mla.cost import (
    GROUPED,
    LATENT,
    WeighedCache,
    crossover,
    grouped_elements,
    grouped_intensity,
    latent_elements,
    latent_intensity,
)
from noise2tokens.mla.experiment import (
    crossing,
    decoding_step,
    full_scale,
    measure_cache,
    one_layer,
    several_seeds,
    train_variants,
    variants,
    without_attention,
)
from noise2tokens.mla.rope import (
    mscale,
    rotate_interleaved,
    to_halves,
    to_interleaved,
    yarn,
    yarn_frequencies,
)
from noise2tokens.transformer import (
    Attention,
    Config,
    Decoder,
    KVCache,
    Layout,
    attend,
    generate,
    rotary,
    rotate,
)

ERRORS = (ValueError, TypeError)
SIZES = {
    "as V3": (Config(37, 32, 2, 4, norm_eps=1e-6), Sizes(16, 8, 4, 8, query_rank=12)),
    "without a query latent": (Config(37, 32, 2, 4, norm_eps=1e-6), Sizes(16, 8, 4, 8)),
    "all different": (
        Config(19, 30, 1, 3, rope_base=100.0, norm_eps=1e-6),
        Sizes(10, 7, 6, 5, query_rank=11),
    ),
    "a narrow latent": (Config(11, 12, 1, 2, norm_eps=1e-6), Sizes(3, 10, 2, 9)),
}
TRAINED = 64
FACTORS = (1, 4, 40)


@pytest.fixture(params=sorted(SIZES))
def case(request):
    return SIZES[request.param]


def make(config, sizes, factor=1, seed=0, **options):
    """A layer with weights large enough that attention is far from uniform, and norms that are not all ones."""
    torch.manual_seed(seed)
    layer = LatentAttention(config, sizes=sizes, score_factor=mscale(factor) ** 2, **options)
    with torch.no_grad():
        for weight in layer.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(
                0.3 * noise + 1 if weight.dim() == 1 else 2 * noise / weight.shape[1] ** 0.5
            )
    return layer.double()


def layout_for(config, sizes, factor, first, tokens):
    positions = torch.arange(first, first + tokens)
    rope = partial(yarn, factor=factor, trained_length=TRAINED) if factor != 1 else rotary
    cos, sin = rope(positions, dim=sizes.rope_dim, base=config.rope_base)
    return Layout(positions, cos[None], sin[None], first + tokens)


def theirs_like(layer, config, sizes, factor, interleaved):
    """transformers' layer with our weights, and its angles in float64 by its own code."""
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if factor != 1:
        rope |= {"rope_type": "yarn", "factor": float(factor), "mscale": 1.0, "mscale_all_dim": 1.0}
        rope |= {"original_max_position_embeddings": TRAINED, "beta_fast": 32.0, "beta_slow": 1.0}
    theirs = DeepseekV3Config(
        hidden_size=config.width,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        q_lora_rank=sizes.query_rank,
        kv_lora_rank=sizes.kv_rank,
        qk_nope_head_dim=sizes.nope_dim,
        qk_rope_head_dim=sizes.rope_dim,
        v_head_dim=sizes.value_dim,
        max_position_embeddings=TRAINED * factor,
        rope_parameters=rope,
        rope_interleave=interleaved,
        attn_implementation="eager",
    )
    peer = DeepseekV3Attention(theirs, 0).double().eval()
    peer.load_state_dict(to_transformers(layer.state_dict(), sizes, interleaved))
    return peer, theirs


@contextmanager
def in_float64():
    """Let transformers' code, which names float32 for norms, softmax and angles, compute in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        yield


def their_angles(theirs, positions):
    """Cosine and sine by transformers' code, run in float64."""
    with in_float64():
        if theirs.rope_parameters["rope_type"] == "yarn":
            omega, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
        else:
            dim, base = theirs.qk_rope_head_dim, theirs.rope_parameters["rope_theta"]
            omega, factor = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0
    assert omega.dtype == torch.float64
    angles = (positions[:, None] * omega).repeat(1, 2)[None]
    return angles.cos() * factor, angles.sin() * factor


def run_theirs(peer, theirs, x, first, cache=None):
    tokens = x.shape[1]
    keys = torch.arange(first + tokens)
    hidden = keys > torch.arange(first, first + tokens)[:, None]
    mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, -math.inf)[None, None]
    angles = their_angles(theirs, torch.arange(first, first + tokens).double())
    with torch.no_grad(), in_float64():
        return peer(x, angles, mask, past_key_values=cache)[0]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("absorbed", [True, False])
def test_prefill_and_decoding_are_those_of_transformers(case, factor, interleaved, absorbed):
    config, sizes = case
    layer = make(config, sizes, factor, absorbed=absorbed)
    peer, theirs = theirs_like(layer, config, sizes, factor, interleaved)
    x = torch.randn(2, 23, config.width, dtype=torch.float64)
    ours_cache, their_cache = KVCache(), DynamicCache()
    first = 0
    for tokens in (13, 1, 1, 5, 3):  # a prompt, single tokens, and several tokens after others
        part = x[:, first : first + tokens]
        want = run_theirs(peer, theirs, part, first, their_cache)
        with torch.no_grad():
            got = layer(part, layout_for(config, sizes, factor, first, tokens), ours_cache)
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
        assert (got - want).abs().max() <= 1e-11  # far below it, in fact
        first += tokens
    latents, rotary_keys = their_cache.layers[0].keys, their_cache.layers[0].values
    (kept,) = ours_cache.append(x.new_empty(2, 1, 0, sizes.kv_rank + sizes.rope_dim))
    assert latents.shape == (2, 1, 23, sizes.kv_rank)
    assert torch.allclose(kept[..., : sizes.kv_rank], latents, atol=1e-12)
    # rotary keys of theirs lie in halves in either case
    assert torch.allclose(kept[..., sizes.kv_rank :], rotary_keys, atol=1e-10)


def test_gradients_of_both_forms_are_those_of_transformers(case):
    config, sizes = case
    x = torch.randn(1, 6, config.width, dtype=torch.float64)
    weight = torch.randn_like(x)
    for absorbed in (False, True):
        layer = make(config, sizes, absorbed=absorbed)
        peer, theirs = theirs_like(layer, config, sizes, 1, True)
        mask = torch.full((6, 6), -math.inf, dtype=x.dtype).triu(1)[None, None]
        angles = their_angles(theirs, torch.arange(6).double())
        with in_float64():
            (peer(x, angles, mask)[0] * weight).sum().backward()
        (layer(x, layout_for(config, sizes, 1, 0, 6)) * weight).sum().backward()
        want = from_transformers({n: p.grad for n, p in peer.named_parameters()}, sizes)
        for name, parameter in layer.named_parameters():
            assert torch.allclose(parameter.grad, want[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("interleaved", [True, False])
def test_weights_convert_both_ways(case, interleaved):
    config, sizes = case
    state = make(config, sizes).state_dict()
    there = to_transformers(state, sizes, interleaved)
    back = from_transformers(there, sizes, interleaved)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    moved = [n for n in there if n.startswith(("q_b", "q_proj", "kv_a_proj"))]
    same = all(torch.equal(there[n], to_transformers(state, sizes, False)[n]) for n in moved)
    assert same is (not interleaved or sizes.rope_dim == 2)


def test_foreign_weights_are_refused(case):
    config, sizes = case
    state = to_transformers(make(config, sizes).state_dict(), sizes)
    for wrong in (state | {"o_proj.bias": torch.zeros(2)}, dict(list(state.items())[1:]), {}):
        with pytest.raises(ValueError, match="need the weight"):
            from_transformers(wrong, sizes)
    with pytest.raises(ValueError, match="need the weight"):
        to_transformers({}, sizes)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4),
    rank=st.integers(1, 9),
    nope=st.integers(1, 7),
    half=st.integers(1, 3),
    value=st.integers(1, 7),
    query=st.none() | st.integers(1, 6),
    batch=st.integers(1, 2),
    past=st.integers(0, 5),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_absorbed_is_expanded(heads, rank, nope, half, value, query, batch, past, tokens, seed):
    config, sizes = Config(3, 4 * heads, 1, heads), Sizes(rank, nope, 2 * half, value, query)
    layer = make(config, sizes, 4, seed)
    x = torch.randn(batch, past + tokens, config.width, dtype=torch.float64)
    found = []
    with torch.no_grad():
        for layer.absorbed in (False, True):
            cache = KVCache()
            if past:
                layer(x[:, :past], layout_for(config, sizes, 4, 0, past), cache)
            found.append(layer(x[:, past:], layout_for(config, sizes, 4, past, tokens), cache))
        layer.absorbed = False
        whole = layer(x, layout_for(config, sizes, 4, 0, past + tokens))[:, past:]
    assert torch.allclose(found[0], found[1], atol=1e-10)
    assert torch.allclose(found[0], whole, atol=1e-10)


@pytest.mark.parametrize("absorbed", [None, True, False])
def test_a_decoder_is_the_same_with_a_cache_and_packed(case, absorbed):
    config, sizes = case
    model = latent_decoder(config, sizes, factor=4, trained_length=TRAINED).double()
    for block in model.blocks:
        block.attention.absorbed = absorbed
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() > 1 else 1)
        tokens = torch.randint(config.vocab_size, (2, 9))
        whole, cache = model(tokens), model.new_cache()
        parts = [model(tokens[:, [t]], cache=cache) for t in range(9)]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)
        lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
        packed = model(tokens[0], cu_seqlens=lengths)
        alone = torch.cat([model(tokens[:1, :4])[0], model(tokens[:1, 4:])[0]])
        assert torch.allclose(packed, alone, atol=1e-10)
    assert generate(model, tokens, 3).shape == (2, 12)


def test_a_decoder_with_yarn_has_its_angles_and_its_factor(case):
    config, sizes = case
    settings = dict(trained_length=TRAINED, fast=9, slow=2)
    positions, numbers = torch.arange(300), dict(dim=sizes.rope_dim, base=config.rope_base)
    for factor in (1, 4):
        model = latent_decoder(config, sizes, factor=factor, **settings)
        for block in model.blocks:
            assert block.attention.score_factor == pytest.approx((0.1 * math.log(factor) + 1) ** 2)
        want = yarn(positions, **numbers, factor=factor, **settings)
        assert all(map(torch.allclose, model.rope(positions), want))


def test_the_cheaper_form_is_taken():
    config, sizes = Config(5, 16, 1, 2), Sizes(16, 4, 2, 4)
    layer, taken = make(config, sizes), []
    for name in ("attend_absorbed", "attend_expanded"):
        form = getattr(layer, name)

        def spy(*arguments, name=name, form=form):
            taken.append(name)
            return form(*arguments)

        setattr(layer, name, spy)
    cache, at = KVCache(), crossover(sizes, 24)
    with torch.no_grad():
        layer(torch.randn(1, 20, 16).double(), layout_for(config, sizes, 1, 0, 20), cache)
        layer(torch.randn(1, 4, 16).double(), layout_for(config, sizes, 1, 20, 4), cache)
        cache.crop(16)
        layer(torch.randn(1, 8, 16).double(), layout_for(config, sizes, 1, 16, 8), cache)
    assert 4 < at < 8
    assert taken == ["attend_expanded", "attend_absorbed", "attend_expanded"]


def counted(layer, config, sizes, absorbed, queries, keys):
    """Operations of the attention alone, from PyTorch's own counter."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    q_N = torch.randn(1, config.heads, queries, sizes.nope_dim).double()
    q_R = torch.randn(1, config.heads, queries, sizes.rope_dim).double()
    latents = torch.randn(1, 1, keys, sizes.kv_rank + sizes.rope_dim).double()
    layout = layout_for(config, sizes, 1, keys - queries, queries)
    form = layer.attend_absorbed if absorbed else layer.attend_expanded
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        form(q_N, q_R, latents, layout)
    return counter.get_total_flops()


@pytest.mark.parametrize("queries, keys", [(1, 9), (3, 9), (7, 20)])
@pytest.mark.parametrize("absorbed", [True, False])
def test_operations_are_those_that_pytorch_counts(case, absorbed, queries, keys):
    config, sizes = case
    got = counted(make(config, sizes), config, sizes, absorbed, queries, keys)
    # sums are as wide as keys, and what is beyond values is dropped
    padding = max(0, sizes.nope_dim + sizes.rope_dim - sizes.value_dim)
    dropped = 2 * config.heads * queries * keys * (sizes.rope_dim if absorbed else padding)
    assert got == operations(sizes, config.heads, queries, keys, absorbed) + dropped


@pytest.mark.parametrize("absorbed", [True, False])
def test_one_width_for_the_fused_kernel(absorbed):
    """PyTorch's fused attention on a CPU takes keys and values of one width only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config, sizes = SIZES["as V3"]
    layer = make(config, sizes, absorbed=absorbed)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        for first, tokens in ((0, 9), (8, 1), (5, 4)):
            cache = KVCache()
            cache.append(torch.randn(1, 1, first, sizes.kv_rank + sizes.rope_dim).double())
            x = torch.randn(1, tokens, config.width).double()
            layer(x, layout_for(config, sizes, 1, first, tokens), cache)


def test_crossover():
    for keys in (1, 100, 4096, 1_000_000):
        at = crossover(V3, keys)
        assert float(at) == pytest.approx(262144 * keys / (1536 * keys + 262144), rel=1e-12)
        below, above = math.floor(at), math.floor(at) + 1
        for queries, absorbed_wins in ((below, True), (above, False)):
            if queries and queries != at:
                cheaper = operations(V3, 128, queries, keys, True) < operations(
                    V3, 128, queries, keys, False
                )
                assert cheaper is absorbed_wins
    assert math.ceil(crossover(V3, 10**9)) == 171
    assert crossover(Sizes(3, 10, 2, 9), 100) is None
    assert operations(Sizes(3, 10, 2, 9), 1, 100, 100, True) < operations(
        Sizes(3, 10, 2, 9), 1, 100, 100, False
    )
    with pytest.raises(ValueError, match="keys"):
        crossover(V3, 0)


@pytest.mark.parametrize("bits", [6, 16, 32])
def test_operations_for_a_byte_are_those_that_are_counted(bits):
    """Of one token more in the cache: operations by PyTorch's counter, over its bytes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def flops(groups, keys):
        q, kv = torch.randn(1, 6, 1, 4), torch.randn(2, 1, groups, keys, 4)
        layout = layout_for(Config(5, 24, 1, 6), Sizes(1, 1, 4, 1), 1, keys - 1, 1)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            attend(q, *kv, layout)
        return counter.get_total_flops()

    for groups in (6, 2, 1):
        more = flops(groups, 9) - flops(groups, 8)
        held = grouped_elements(1, groups, 4) * bits / 8
        assert grouped_intensity(6, groups, bits) == pytest.approx(more / held)
    more = operations(V3, 128, 1, 9, True) - operations(V3, 128, 1, 8, True)
    held = latent_elements(1, 512, 64) * bits / 8
    assert latent_intensity(128, 512, 64, bits) == pytest.approx(more / held)


@pytest.mark.parametrize("factor", [1, 2.5, 4, 40])
@pytest.mark.parametrize(
    "dim, base, length",
    [(64, 10_000.0, 4096), (8, 500.0, 64), (2, 10.0, 9), (8, 500.0, 4096), (4, 10.0, 4096)],
)
def test_yarn_is_that_of_transformers(factor, dim, base, length):
    config = DeepseekV3Config(
        qk_rope_head_dim=dim,
        max_position_embeddings=int(length * factor),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": base,
            "factor": float(factor),
            "original_max_position_embeddings": length,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )
    want, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    got = yarn_frequencies(dim, base, factor, length)
    assert torch.allclose(got.float(), want, rtol=2e-6)
    assert attention_factor == 1  # so it appears in the scores alone


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    plain = 10_000.0 ** -(torch.arange(32).double() / 32)
    ratio = yarn_frequencies(64, 10_000, 40, 4096) / plain
    turns = 4096 * plain / (2 * math.pi)
    assert torch.allclose(ratio[turns > 40], torch.ones(1).double(), rtol=1e-12)
    assert torch.allclose(ratio[turns < 0.7], torch.full((1,), 1 / 40).double(), rtol=1e-12)
    # V3: pairs 10 to 23 make the ramp, linear in the index
    share = (1 - ratio) / (1 - 1 / 40)
    assert torch.allclose(share[10:24], torch.arange(14).double() / 13, atol=1e-12)
    positions = torch.tensor([0, 5, 100_000])
    cos, sin = yarn(positions, 64, 10_000, 40, 4096)
    assert torch.allclose(torch.atan2(sin[1], cos[1])[3:], (5 * plain * ratio)[3:], atol=1e-12)
    assert mscale(40) == pytest.approx(1.3688879454) and mscale(1) == mscale(0.5) == 1


def test_orders_of_rotary_coordinates():
    x = torch.arange(6.0).expand(2, 6)
    assert to_halves(x)[0].tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(to_interleaved(to_halves(x)), x)
    x, y = torch.randn(2, 3, 5, 8).double()
    cos, sin = rotary(torch.arange(5), 8, 100.0)
    turned = rotate_interleaved(x, cos, sin)
    assert torch.allclose(to_halves(turned), rotate(to_halves(x), cos, sin))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    assert torch.allclose(turned, torch.view_as_real(pairs).flatten(-2))
    scores = turned @ rotate_interleaved(y, cos, sin).mT
    assert torch.allclose(
        scores, rotate(to_halves(x), cos, sin) @ rotate(to_halves(y), cos, sin).mT
    )
    assert (scores - rotate(x, cos, sin) @ rotate(y, cos, sin).mT).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_bytes_are_those_of_the_formulas(dtype):
    tokens = torch.randint(5, (3, 7))
    models = {
        grouped_elements(2, g, 4): Decoder(Config(5, 16, 2, 4, kv_heads=g)) for g in (4, 2, 1)
    }
    models[latent_elements(2, 6, 2)] = latent_decoder(Config(5, 16, 2, 4), Sizes(6, 4, 2, 5))
    for elements, model in models.items():
        model.to(dtype)
        cache = [WeighedCache(20) for _ in model.blocks]
        with torch.no_grad():
            logits = model(tokens, cache=cache)
            assert torch.equal(logits, model(tokens, cache=model.new_cache(20)))
        held = sum(layer.nbytes for layer in cache)
        assert held == 3 * 7 * dtype.itemsize * elements
        for layer in cache:
            layer.crop(2)
        assert sum(layer.nbytes for layer in cache) == held * 2 // 7
        assert measure_cache(model) == dtype.itemsize * elements
    assert WeighedCache().nbytes == 0


def test_published_caches():
    assert latent_elements(*LATENT["DeepSeek-V3, MLA"]) == 35_136
    assert latent_elements(*LATENT["DeepSeek-V2, MLA"]) == 34_560
    assert grouped_elements(*GROUPED["DeepSeek 67B, GQA"]) == 194_560
    assert grouped_elements(*GROUPED["Llama 2 7B, MHA"]) == 262_144
    assert grouped_elements(*GROUPED["Llama 3 70B, GQA"]) == 163_840
    assert grouped_elements(*GROUPED["Llama 3.1 405B, GQA"]) == 258_048


@pytest.mark.parametrize(
    "call",
    [
        lambda: Sizes(0, 4, 2, 4),
        lambda: Sizes(4, 4, 3, 4),
        lambda: Sizes(4, 4, 2, 4, query_rank=0),
        lambda: mscale(0),
        lambda: mscale(math.nan),
        lambda: yarn_frequencies(3, 10.0, 2, 64),
        lambda: yarn_frequencies(4, 1.0, 2, 64),
        lambda: yarn_frequencies(4, 10.0, 0.5, 64),
        lambda: yarn_frequencies(4, 10.0, 2, 0),
        lambda: yarn_frequencies(4, 10.0, 2, 64, fast=1, slow=1),
        lambda: grouped_elements(0, 1, 1),
        lambda: latent_elements(1, 1, 0),
        lambda: grouped_intensity(1, 0),
        lambda: latent_intensity(1, 1, 1, bits=0),
    ],
)
def test_bad_input(call):
    with pytest.raises(ERRORS, match="need"):
        call()


def test_variants_are_of_equal_size():
    models = variants(64, 2, 4)
    sizes = {name: sum(w.numel() for w in model.parameters()) for name, model in models.items()}
    assert max(sizes.values()) / min(sizes.values()) < 1.005
    elements = {"MHA": 2 * 4 * 16, "GQA, 2 groups": 2 * 2 * 16, "MQA": 2 * 16, "MLA": 32 + 8}
    assert {n: measure_cache(m) for n, m in models.items()} == {
        name: 4 * 2 * count for name, count in elements.items()
    }


TRAINING = dict(
    width=16,
    layers=1,
    heads=4,
    length=16,
    batch=4,
    steps=30,
    learning_rate=1e-2,
    windows_held_out=64,
)


def test_a_slice_of_the_long_run():
    timing = dict(
        decode_width=32,
        decode_heads=4,
        keys=(8, 30, 300),
        decode_batch=2,
        queries=(1, 9),
        seconds=0.01,
    )
    cpu = torch.device("cpu")
    found, pictures = full_scale(cpu, seed=0, seeds=2, **timing, **TRAINING)
    again = several_seeds(cpu, 1, 1, **TRAINING)
    again |= several_seeds(cpu, 1, 1, kinds=without_attention, **TRAINING)
    assert set(found["trained"]) == set(again)
    for name, kind in found["trained"].items():
        first, second = kind["bits"]
        assert 3 < first < 7 and first != second  # 8 bits before training
        assert again[name]["bits"] == [second]
    bits = [kind["bits"][0] for kind in found["trained"].values()]
    assert len(set(bits)) == 5 and found["trained"]["no attention"]["bytes"] == 0
    forms = {"expanded", "absorbed"}
    kinds = {"MHA", "GQA, 2 groups", "MQA"} | {f"MLA, {form}" for form in forms}
    assert {n: set(row) for n, row in found["milliseconds"].items()} == {
        n: kinds for n in ("8", "30", "300")
    }
    assert {n: set(row) for n, row in found["forms"].items()} == {"1": forms, "9": forms}
    assert len(pictures) == 2


def test_bits_are_those_of_files_that_were_not_trained_on():
    from noise2tokens.text import Bytes, corpus, split_files

    found = train_variants(torch.device("cpu"), 0, **TRAINING | {"steps": 60})
    # a model of single bytes, fit to the held-out files themselves, cannot be far below or above
    held_out = torch.cat([Bytes().encode(text) for text in split_files(corpus())[1].values()])
    share = held_out.bincount().double() / len(held_out)
    single = -(share[share > 0] * share[share > 0].log2()).sum().item()
    for kind in found.values():
        assert single - 1.5 < kind["bits"] < single + 0.5
        assert len(kind["curve"]) == 60 and kind["curve"][-1] < kind["curve"][0]


def test_without_attention_no_token_sees_another():
    (model,) = without_attention(16, 2, 4).values()
    tokens = torch.randint(256, (1, 9))
    other = torch.cat([torch.randint(256, (1, 8)), tokens[:, 8:]], 1)
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, 8], model(other)[:, 8])
        full = variants(16, 2, 4)["MHA"]
        assert not torch.allclose(full(tokens)[:, 8], full(other)[:, 8])  # a control
    sizes = [sum(weight.numel() for weight in m.parameters()) for m in (model, full)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    found = train_variants(torch.device("cpu"), 0, kinds=without_attention, **TRAINING)
    assert set(found) == {"no attention"} and found["no attention"]["bytes"] == 0


def test_training_and_held_out_files_are_not_confused(monkeypatch):
    """After nothing but `ab`, other letters are a surprise; `ab` would be none, and letters learned would be less."""
    letters = "".join(chr(97 + i) for i in torch.randint(26, (3000,)).tolist())
    files = {"train": "ab" * 1500}, {"test": letters}
    monkeypatch.setattr(experiment, "split_files", lambda _: files)
    for kind in train_variants(torch.device("cpu"), 0, **TRAINING).values():
        assert kind["bits"] > 6


def test_a_timed_step_is_the_layer_after_its_cache():
    for name, layer in one_layer(32, 4).items():
        seen = []
        layer.register_forward_hook(lambda _, given, out, seen=seen: seen.append((given, out)))
        step = decoding_step(layer, 6, 2, 3)
        step()
        step()
        ((x, layout, cache), first), (_, second) = seen
        assert torch.equal(first, second) and cache.length == 6, name
        assert x.shape == (3, 2, 32) and layout.keys == 8 and layout.positions.tolist() == [6, 7]
        # the same by hand, from what the cache holds
        with torch.no_grad():
            other = KVCache()
            other.append(*(kept[..., :6, :].clone() for kept in cache._reserve))
            assert torch.allclose(layer(x, layout, other), first, atol=1e-6)
        latent = isinstance(layer, LatentAttention)
        assert latent == name.startswith("MLA") and isinstance(layer, LatentAttention | Attention)
        if latent:
            assert layer.absorbed is name.endswith("absorbed")
            assert layer.sizes == Sizes(32, 8, 4, 8)
        else:
            groups = {"MHA": 4, "GQA, 2 groups": 2, "MQA": 1}
            assert layer.key.weight.shape == (8 * groups[name], 32)


def test_crossing():
    times = {"1": dict(absorbed=1.0, expanded=4.0), "4": dict(absorbed=2.0, expanded=4.0)}
    assert crossing(times) is None
    times["16"] = dict(absorbed=8.0, expanded=4.0)
    assert crossing(times) == pytest.approx(8)
    assert crossing(times | {"16": dict(absorbed=32.0, expanded=4.0)}) == pytest.approx(4 * 2**0.5)
