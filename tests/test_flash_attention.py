"""Chapter 08 without the kernels: online softmax as a monoid, tiled attention and its gradient, and what it costs."""

import inspect
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch.nn.attention.bias import causal_lower_right

import noise2tokens.flash_attention as api
from noise2tokens.benchmark import Timing
from noise2tokens.flash_attention import (
    cost,
    experiment,
    flash_attention,
    flash_attention_varlen,
    pictures,
)
from noise2tokens.flash_attention.softmax import (
    NEVER,
    SoftmaxState,
    block_state,
    finish,
    identity_like,
    merge,
    one_pass,
    online,
    three_pass,
)
from noise2tokens.flash_attention.tiled import (
    SlowMemory,
    causal_mask,
    group_heads,
    plain_attention,
    plain_backward,
    plain_forward,
    tile_spans,
    tiled_attention,
    tiled_backward,
    tiled_forward,
)


def draw(shape, seed=0, dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(requires_grad)


def inputs(batch, heads, kv_heads, queries, keys, dim, value_dim=None, dtype=torch.float64, seed=0):
    """Random q, k, v that want gradients."""
    shapes = [(heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim or dim)]
    return [draw((batch, *shape), seed + i, dtype, True) for i, shape in enumerate(shapes)]


def sdpa(q, k, v, causal):
    """The peer: PyTorch's attention, with the causal mask aligned at the bottom right."""
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    if causal:
        mask = mask.tril(k.shape[-2] - q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def error(ours, reference):
    return (ours.double() - reference.double()).abs().max().item()


def assert_no_worse(ours, plain, reference):
    """At most twice the error of the plain way at the same precision, and two units in the last place."""
    scale = reference.abs().max().item()
    bound = 2 * error(plain, reference) + 2 * torch.finfo(ours.dtype).eps * scale
    assert error(ours, reference) <= bound, (error(ours, reference), bound)


# Softmax


def test_three_two_and_one_pass_agree_with_torch():
    scores, values = draw((3, 5, 11)) * 10, draw((3, 11, 4), 1)
    weights = torch.softmax(scores, -1)
    assert error(three_pass(scores), weights) < 1e-15
    assert error(online(scores), weights) < 1e-15
    assert error(one_pass(scores, values), weights @ values) < 1e-14


@pytest.mark.parametrize(
    "softmax", [three_pass, online, lambda s: one_pass(s, draw((s.shape[-1], 2)))]
)
@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(3, 0),
        torch.tensor([[0.0, 1.0, NEVER, 2.0]]),
        torch.tensor([[0.0, float("nan"), 1, 1]]),
    ],
)
def test_a_softmax_of_nothing_or_of_no_number_is_refused(softmax, scores):
    with pytest.raises(ValueError, match="finite scores, at least one a row"):
        softmax(scores.double())


def test_softmax_of_huge_scores_does_not_overflow():
    scores = torch.tensor([[1e4, 1e4 - 1.0, -1e4]])
    for softmax in (three_pass, online):
        torch.testing.assert_close(softmax(scores), torch.softmax(scores, -1))


def states(seed, rows=3, dim=2):
    """A random state, as some block of keys would leave it."""
    keys = seed % 4 + 1
    scores = draw((rows, keys), seed) * 10.0 ** (seed % 3)
    scores[seed % rows, :] = NEVER if seed % 5 == 0 else scores[seed % rows, :]
    return block_state(scores, draw((keys, dim), seed + 1))


def assert_same(a: SoftmaxState, b: SoftmaxState):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


seeds = st.integers(0, 10_000)


@given(seeds, seeds, seeds)
@settings(max_examples=60, deadline=None)
def test_merge_is_associative(i, j, k):
    a, b, c = states(i), states(j), states(k)
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(seeds, seeds)
@settings(max_examples=60, deadline=None)
def test_merge_is_commutative(i, j):
    assert_same(merge(states(i), states(j)), merge(states(j), states(i)))


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_the_state_of_no_keys_is_the_identity(i):
    a = states(i)
    nothing = identity_like(a.o)
    assert_same(merge(a, nothing), a)
    assert_same(merge(nothing, a), a)
    assert_same(merge(nothing, nothing), nothing)


@given(seeds, st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_any_cut_of_the_keys_gives_the_same_output(seed, keys, data):
    scores, values = draw((4, keys), seed) * 5, draw((keys, 3), seed + 1)
    cuts = sorted(data.draw(st.lists(st.integers(0, keys), max_size=5)))
    state = identity_like(values[:1].expand(4, 3))
    for start, stop in zip([0, *cuts], [*cuts, keys], strict=True):
        if stop > start:
            state = merge(state, block_state(scores[:, start:stop], values[start:stop]))
    output, lse = finish(state)
    assert error(output, torch.softmax(scores, -1) @ values) < 1e-13
    assert error(lse, scores.logsumexp(-1)) < 1e-13


def test_an_empty_block_is_the_identity():
    empty = block_state(torch.zeros(3, 0), torch.zeros(0, 2))
    for ours, expected in zip(empty, identity_like(torch.zeros(3, 2)), strict=True):
        assert torch.equal(ours, expected)


def test_a_row_without_keys_finishes_at_zero():
    output, lse = finish(identity_like(torch.zeros(2, 3)))
    assert (output == 0).all() and (lse == NEVER).all()


# Attention

SHAPES = [
    # batch, heads, kv_heads, queries, keys, dim, value_dim
    (1, 1, 1, 1, 1, 16, 16),
    (2, 4, 2, 17, 17, 16, 16),
    (1, 2, 2, 127, 129, 32, 32),
    (1, 2, 1, 129, 127, 64, 32),
    (1, 3, 1, 1, 300, 128, 128),
    (1, 2, 1, 300, 5, 24, 40),
    (1, 1, 1, 257, 257, 256, 256),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_sdpa_in_double_precision(shape, causal):
    q, k, v = inputs(*shape)
    rows = (
        slice(max(0, shape[3] - shape[4]), None) if causal else slice(None)
    )  # rows that see something
    ours, peer = flash_attention(q, k, v, causal), sdpa(q, k, v, causal)
    assert error(ours[:, :, rows], peer[:, :, rows]) < 1e-13
    grad = draw(ours.shape, 9)
    grad[:, :, : rows.start] = 0
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad),
        torch.autograd.grad(peer[:, :, rows], (q, k, v), grad[:, :, rows]),
        strict=True,
    ):
        assert error(a, b) < 1e-12


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[4]])
def test_no_worse_than_the_plain_way_at_the_same_precision(shape, dtype, without_onednn):
    low = inputs(*shape, dtype=dtype)
    high = [x.detach().double().requires_grad_() for x in low]
    outputs = [
        f(*x, causal=True)
        for f, x in ((flash_attention, low), (plain_attention, low), (plain_attention, high))
    ]
    assert outputs[0].dtype == dtype
    assert_no_worse(*outputs)
    grad = draw(outputs[0].shape, 9, dtype)
    gradients = [
        torch.autograd.grad(o, x, grad.to(o.dtype))
        for o, x in zip(outputs, (low, low, high), strict=True)
    ]
    for ours, theirs, reference in zip(*gradients, strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours, theirs, reference)


@pytest.fixture
def without_onednn():
    """Some virtual machines announce matrix units (AMX) and kill who uses them; oneDNN would in bfloat16."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tile", [(2, 3), (8, 8), (3, 2)])
def test_gradcheck_of_output_and_lse(monkeypatch, causal, tile):
    """Small tiles, so that a few rows make several; the gradient through LSE is checked with that through O."""
    for name in ("tiled_forward", "tiled_backward"):
        function = getattr(sys.modules["noise2tokens.flash_attention.tiled"], name)
        monkeypatch.setattr(
            f"noise2tokens.flash_attention.tiled.{name}",
            lambda *args, function=function: function(*args, tile=tile),
        )
    q, k, v = inputs(1, 4, 2, 5, 7, 3, 2)
    assert torch.autograd.gradcheck(lambda *x: tiled_attention(*x, causal, 0.7), (q, k, v))


def test_gradient_through_lse_alone():
    q, k, v = inputs(1, 2, 1, 40, 60, 8)
    lse = flash_attention(q, k, v, return_lse=True)[1]
    reference = (q @ k.mT * 8**-0.5).logsumexp(-1)
    for a, b in zip(
        torch.autograd.grad(lse.square().sum(), (q, k)),
        torch.autograd.grad(reference.square().sum(), (q, k)),
        strict=True,
    ):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_lse_equals_that_of_pytorchs_own_flash_kernel(causal):
    q, k, v = (draw((2, 3, 100, 32), i, torch.float32) for i in range(3))
    o, lse = flash_attention(q, k, v, causal, return_lse=True)
    peer_o, peer_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal
    )
    assert error(o, peer_o) < 1e-6
    assert error(lse, peer_lse) < 1e-6


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    seeds,
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_tile(kv_heads, group, queries, keys, causal, seed):
    q, k, v = inputs(1, kv_heads * group, kv_heads, queries, keys, 8, seed=seed)
    ours, lse = tiled_forward(
        *group_heads(q, k, v), causal, 0.5, SlowMemory(), (seed % 33 + 1, seed % 29 + 1)
    )
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT * 0.5).masked_fill(~causal_mask(queries, keys) & causal, NEVER)
    assert error(ours.flatten(1, 2), torch.softmax(scores, -1).nan_to_num(0) @ v) < 1e-13
    torch.testing.assert_close(lse.flatten(1, 2), scores.logsumexp(-1), rtol=1e-13, atol=1e-13)


def test_rows_that_see_no_key_are_zero_and_pass_no_gradient():
    q, k, v = inputs(1, 2, 1, 9, 4, 8)
    o, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert (o[:, :, :5] == 0).all() and (lse[:, :, :5] == NEVER).all()
    assert lse[:, :, 5:].isfinite().all()
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, :5] == 0).all() and (gradients[0][:, :, 6:] != 0).any()


def test_no_keys_at_all():
    q, k, v = inputs(1, 2, 1, 3, 0, 8)
    o, lse = flash_attention(q, k, v, return_lse=True)
    assert (o == 0).all() and (lse == NEVER).all()
    assert (torch.autograd.grad(o.sum(), q)[0] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_huge_logits_do_not_overflow(causal):
    q, k, v = (draw((1, 1, 130, 16), i, torch.float32) for i in range(3))
    q = (q * 1e4).requires_grad_()
    o = flash_attention(q, k, v, causal)
    assert error(o, sdpa(q.double(), k.double(), v.double(), causal)) < 1e-5
    assert torch.autograd.grad(o.sum(), q)[0].isfinite().all()


def test_a_nan_is_not_hidden():
    q, k, v = (draw((1, 1, 150, 16), i) for i in range(3))
    k[0, 0, 140] = torch.nan
    assert flash_attention(q, k, v).isnan().all()


def test_causal_masks():
    assert causal_mask(2, 5).tolist() == [[True] * 4 + [False], [True] * 5]
    assert causal_mask(3, 1).tolist() == [[False], [False], [True]]
    for queries, keys in ((4, 4), (1, 6), (3, 9)):
        q, k, v = (draw((1, 1, n, 8), i) for i, n in enumerate((queries, keys, keys)))
        peer = F.scaled_dot_product_attention(q, k, v, causal_lower_right(queries, keys))
        assert error(flash_attention(q, k, v, causal=True), peer) < 1e-13


def test_the_plain_way_equals_sdpa_and_is_nan_where_nothing_is_seen():
    for causal in (False, True):
        q, k, v = (x.detach() for x in inputs(2, 4, 2, 6, 9, 8))
        peer = sdpa(q, k, v, causal)
        assert error(plain_attention(q, k, v, causal), peer) < 1e-14
        counted, _ = plain_forward(*group_heads(q, k, v), causal, 8**-0.5, SlowMemory())
        assert error(counted.flatten(1, 2), peer) < 1e-14
    assert plain_attention(k, *[q[:, :2]] * 2, causal=True)[:, :, :3].isnan().all()


def test_the_counted_plain_backward_equals_autograd():
    q, k, v = inputs(2, 4, 2, 6, 9, 8)
    o = plain_attention(q, k, v, True, 0.3)
    grad = draw(o.shape, 5)
    grouped = [x.detach() for x in group_heads(q, k, v)]
    _, weights = plain_forward(*grouped, True, 0.3, SlowMemory())
    ours = plain_backward(*grouped, weights, grad.unflatten(1, (2, 2)), 0.3, SlowMemory())
    for a, b in zip(ours, torch.autograd.grad(o, (q, k, v), grad), strict=True):
        assert error(a.flatten(1, 2), b) < 1e-13


def test_the_same_seed_gives_the_same_bits():
    first, second = (
        torch.autograd.grad(flash_attention(*x, causal=True).square().sum(), x)
        for x in (inputs(1, 2, 1, 200, 200, 16, dtype=torch.float32) for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Packed sequences


def packed(lengths_q, lengths_k, heads=4, kv_heads=2, dim=8, dtype=torch.float64):
    q = draw((sum(lengths_q), heads, dim), 0, dtype, True)
    k, v = (draw((sum(lengths_k), kv_heads, dim), i, dtype, True) for i in (1, 2))
    offsets = [
        F.pad(torch.tensor(n).cumsum(0), (1, 0)).to(torch.int32) for n in (lengths_q, lengths_k)
    ]
    return q, k, v, *offsets


def one_by_one(q, k, v, lengths_q, lengths_k, causal):
    """The peer: SDPA on each sequence alone."""
    parts = zip(
        *(x.split(n) for x, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))), strict=True
    )
    outputs = [
        sdpa(*(x.transpose(0, 1)[None] for x in part), causal)[0].transpose(0, 1) for part in parts
    ]
    return torch.cat(outputs)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_do_not_see_each_other(causal):
    lengths_q, lengths_k = [3, 1, 150, 7], [3, 9, 150, 8]
    q, k, v, cu_q, cu_k = packed(lengths_q, lengths_k)
    ours, lse = flash_attention_varlen(q, k, v, cu_q, cu_k, 150, 150, causal, return_lse=True)
    peer = one_by_one(q, k, v, lengths_q, lengths_k, causal)
    assert error(ours, peer) < 1e-13 and lse.shape == ours.shape[:-1]
    grad = draw(ours.shape, 5)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad),
        torch.autograd.grad(peer, (q, k, v), grad),
        strict=True,
    ):
        assert error(a, b) < 1e-12


def test_packed_sequences_may_be_empty():
    q, k, v, cu_q, cu_k = packed([3, 0, 4], [3, 0, 4])
    peer = one_by_one(*(x for x in (q, k, v)), [3, 4], [3, 4], True)
    assert error(flash_attention_varlen(q, k, v, cu_q, cu_k, 4, 4, causal=True), peer) < 1e-13


# Bad input


def test_bad_input_is_named():
    x = torch.zeros(2, 4, 5, 8)
    bad = [
        (ValueError, "axes", x[0], x, x),
        (ValueError, "multiple", x[:, :3], x[:, :2], x[:, :2]),
        (ValueError, "same head dimension", x, x[..., :4], x),
        (ValueError, "same heads and length", x, x, x[:, :, :3]),
        (ValueError, "one batch size", x[:1], x, x),
        (ValueError, "one dtype", x, x.double(), x),
        (TypeError, "got torch.int64", x.long(), x, x),
        (ValueError, "one device", x, x.to("meta"), x),
    ]
    for kind, message, *qkv in bad:
        with pytest.raises(kind, match=message):
            api.check_inputs(*qkv, False, None, batch_axes=1)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be positive"):
            flash_attention(x, x, x, scale=scale)
    with pytest.raises(ValueError, match="multiple"):
        flash_attention(x, x[:, :3], x[:, :3])
    untyped = inspect.unwrap(api.check_inputs)  # as a reader calls it, without the tests' checker
    with pytest.raises(TypeError, match="causal must be True or False, not a mask, got Tensor"):
        untyped(x, x, x, torch.ones(5, 5), None, batch_axes=1)
    for scale in (torch.tensor(0.5), True):
        with pytest.raises(TypeError, match="scale must be a number"):
            untyped(x, x, x, False, scale, batch_axes=1)
    with pytest.raises(TypeError, match="k must be a tensor, got list"):
        untyped(x, [1.0], x, False, None, batch_axes=1)


@pytest.mark.parametrize(
    "offsets",
    [[3, 2, 4], [0, 5, 3, 9], [0, 3, 8], [0, 3, 10], [1, 3, 9], [0, 9]],
    ids=["lengths", "falling", "too short", "too long", "late", "longer than the maximum"],
)
def test_offsets_that_are_none_are_refused(offsets):
    x = torch.zeros(9, 2, 8)
    cu = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match="must hold offsets that start at 0"):
        flash_attention_varlen(x, x, x, cu, cu, 6, 6)


def test_offsets_of_the_wrong_kind_are_refused():
    x, cu = torch.zeros(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(TypeError, match="int32"):
        flash_attention_varlen(x, x, x, cu.long(), cu.long(), 9, 9)
    with pytest.raises(ValueError, match="two offsets"):
        api.check_offsets(cu[:1], 9, 9, "cu_seqlens_q", x.device)
    with pytest.raises((ValueError, TypeError)):
        flash_attention_varlen(x, x, x, cu, torch.tensor([0, 9], dtype=torch.int32), 9, 9)
    with pytest.raises(ValueError, match="must lie on meta"):
        api.check_offsets(cu, 9, 9, "cu_seqlens_q", torch.device("meta"))
    with pytest.raises(TypeError, match="int32 tensor, got list"):
        inspect.unwrap(api.check_offsets)([0, 9], 9, 9, "cu_seqlens_q", x.device)
    for longest in (9.0, -1):
        with pytest.raises(TypeError, match="longest length"):
            inspect.unwrap(api.check_offsets)(cu, 9, longest, "cu_seqlens_q", x.device)


# Cost


@pytest.mark.parametrize(
    ("length", "dim", "rows"), [(1, 1, 1), (64, 16, 16), (100, 8, 32), (129, 4, 128)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_counted_bytes_equal_the_closed_forms(length, dim, rows, dtype):
    q, k, v = (draw((2, 3, 1, length, dim), i, dtype) for i in range(3))
    memory = SlowMemory()
    o, weights = plain_forward(q, k, v, False, 1.0, memory)
    assert memory.moved == 6 * cost.plain_bytes(length, dim, dtype.itemsize)
    memory = SlowMemory()
    plain_backward(q, k, v, weights, o, 1.0, memory)
    assert memory.moved == 6 * cost.plain_bytes(length, dim, dtype.itemsize, backward=True)
    memory = SlowMemory()
    tiled_forward(q, k, v, False, 1.0, memory, (rows, 16))
    assert memory.moved == 6 * cost.tiled_bytes(length, dim, dtype.itemsize, rows)
    assert memory.written == 6 * length * (dim * dtype.itemsize + max(4, dtype.itemsize))


def test_a_causal_mask_saves_the_loads_of_hidden_tiles():
    q, k, v = (draw((1, 1, 1, 64, 8), i) for i in range(3))
    memory = SlowMemory()
    tiled_forward(q, k, v, True, 1.0, memory, (8, 8))
    blocks = 8 * 9 // 2  # tiles on and below the diagonal
    assert memory.read == (64 * 8 + blocks * 2 * 8 * 8) * 8


def test_backward_moves_what_the_algorithm_says():
    length, dim, rows, columns = 96, 8, 16, 32
    q, k, v, grad = (draw((1, 1, 1, length, dim), i) for i in range(4))
    o, lse = tiled_forward(q, k, v, False, 1.0, SlowMemory())
    memory = SlowMemory()
    tiled_backward(
        q, k, v, o, lse, grad, torch.zeros_like(lse), False, 1.0, memory, (rows, columns)
    )
    sweeps = length // columns  # Q, dO, dQ, LSE and D are read once for each block of keys
    read = 2 * length * dim + length + 2 * length * dim + sweeps * (3 * length * dim + 2 * length)
    written = length + 2 * length * dim + sweeps * length * dim
    assert (memory.read, memory.written) == (8 * read, 8 * written)


@given(st.integers(1, 256), st.integers(1, 10**6))
def test_the_tile_fits_and_makes_the_traffic_fall_with_memory(dim, on_chip):
    if on_chip < 5 * dim:
        with pytest.raises(ValueError, match="fast memory"):
            cost.tile_for(on_chip, dim)
        return
    rows, columns = cost.tile_for(on_chip, dim)
    assert 2 * rows * dim + 2 * columns * dim + rows * columns <= on_chip
    length = rows * 7
    elements = 2 * length * dim + 2 * length * dim * 7
    assert cost.tiled_bytes(length, dim, 4, rows) == 4 * (elements + length)


def test_flops():
    assert cost.attention_flops(64, 16, 1024, 64, causal=False) == 4 * 1024**2 * 64 * 16 * 64
    assert cost.attention_flops(1, 1, 10, 2, causal=True, backward=True) == 4 * 100 * 2 / 2 * 2.5


def test_flops_agree_with_pytorchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = inputs(2, 3, 3, 128, 128, 16)
    with FlopCounterMode(display=False) as counter:
        o, _ = tiled_attention(q, k, v, False, 1.0)
    forward = counter.get_total_flops()
    assert forward == cost.attention_flops(2, 3, 128, 16, causal=False)
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_total_flops() == 2.5 * forward


def test_peak_memory_is_quadratic_for_the_plain_way_and_linear_for_ours():
    def peaks(attention):
        found = []
        for length in (512, 1024):
            q, k, v = inputs(1, 1, 1, length, length, 32, dtype=torch.float32)
            found.append(cost.peak_bytes(lambda q=q, k=k, v=v: attention(q, k, v).sum().backward()))
        return found

    short, long = peaks(plain_attention)
    assert 3.5 < long / short < 4.1
    short, long = peaks(flash_attention)
    assert 1.4 < long / short < 2.1


def test_peak_bytes_counts_what_lives_at_the_same_time():
    def run():
        for _ in range(3):
            a = torch.ones(1000)
            b = a + 1
            del a, b

    assert cost.peak_bytes(run) == 8000


def test_spans():
    assert list(tile_spans(7, 3)) == [(0, 3), (3, 6), (6, 7)] and list(tile_spans(0, 3)) == []
    for length, tile in ((7, 0), (7, -1), (-1, 3)):
        with pytest.raises(ValueError, match=f"got {length} and {tile}"):
            tile_spans(length, tile)


def test_sizes_that_no_tile_has_are_refused():
    with pytest.raises(ValueError, match="at least one row, got 0"):
        cost.tiled_bytes(64, 8, 4, 0)
    with pytest.raises(ValueError, match="head dimension 0"):
        cost.tile_for(1000, 0)
    with pytest.raises(ValueError, match="multiple of each dimension, got 24 and 16"):
        experiment.speed((16,), (16,), torch.device("cpu"), 32, 24, 0.001)


def test_works_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from noise2tokens.flash_attention import flash_attention\n"
        "x = torch.randn(1, 1, 4, 8)\n"
        "assert flash_attention(x, x, x).shape == x.shape\n"
        "assert 'noise2tokens.flash_attention.kernel' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Measuring and drawing, as far as a CPU can


CPU = torch.device("cpu")


def test_speed_has_a_row_for_every_backend_and_says_why_one_is_missing():
    rows = experiment.speed((16, 32), (8, 16), CPU, tokens=64, width=32, seconds=0.005)
    assert len(rows) == 2 * 2 * 2 * len(experiment.ATTENTIONS)
    for row in rows:
        if row["backend"] == "SDPA cuDNN":
            assert row["reason"] and "forward" not in row
        else:
            assert row["forward"] > 0 and row["backward"] > 0 and row["peak_bytes"] > 0


def test_speed_counts_operations_per_second(monkeypatch):
    def timed(calls, **_):
        for call in calls.values():
            call()
        return {name: Timing(1e-12, 0.0, 0.0, 1.0, 3) for name in calls}

    monkeypatch.setattr(experiment, "compare", timed)
    row = experiment.speed((16,), (8,), CPU, tokens=64, width=32)[0]
    assert row["forward"] == 4 * 16**2 * 8 * 4 * 4 and row["backward"] == 2.5 * row["forward"]
    assert (
        experiment.speed((16,), (8,), CPU, tokens=64, width=32)[4]["forward"] == row["forward"] / 2
    )


def test_a_defect_of_our_own_is_not_taken_for_a_missing_backend(monkeypatch):
    def broken(q, k, v, causal):
        raise RuntimeError("a defect")

    monkeypatch.setitem(experiment.ATTENTIONS, "ours", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        experiment.speed((16,), (8,), CPU, tokens=64, width=32)

    def greedy(q, k, v, causal):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(experiment.ATTENTIONS, "ours", greedy)
    rows = experiment.speed((16,), (8,), CPU, tokens=64, width=32, seconds=0.005)
    assert rows[0]["reason"] == "out of memory"


SLICE = dict(
    lengths=(16,), dims=(8,), tokens=32, width=16, seconds=0.005, gpt2=(1, 2, 512, 16),
    memory_lengths=(256,), doubling=(16, 32), limit=1e9, sweep=(),
)  # fmt: skip


def test_full_scale_on_a_slice():
    results, pictures = experiment.full_scale(CPU, seed=0, **SLICE)
    assert len(results["speed"]) == 2 * len(experiment.ATTENTIONS)
    assert results["longest"] == {"plain": 32, "ours": 32}
    for found in (results["gpt2"], results["memory"]["256"]):
        assert found["plain_ms"] > 0 and found["ours_ms"] > 0 and found["speedup"] > 0
    assert results["gpt2"]["plain_bytes"] > 2 * results["gpt2"]["ours_bytes"]
    assert list(pictures) == ["Operations of the algorithm per second, head dimension 8"]
    plt.close("all")


def test_the_fastest_tile_wins_and_failures_keep_their_reason():
    seconds = {"a": 3.0, "b": 1.0, "c": 2.0}

    def measure(tile):
        if tile == "d":
            raise ValueError("needs 300 kB of shared memory\nand more")
        return seconds[tile]

    best, found = experiment.fastest_tile(["a", "d", "b", "c"], measure)
    assert best == "b" and found == seconds | {"d": "needs 300 kB of shared memory"}
    with pytest.raises(RuntimeError, match="no tile runs"):
        experiment.fastest_tile(["d"], measure)


# What autograd and autocast ask of a function


def test_autocast_does_not_lower_the_precision_of_single_products():
    q, k, v = inputs(1, 2, 2, 40, 40, 16, dtype=torch.float32)
    expected = flash_attention(q, k, v)
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, (q, k, v), grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = flash_attention(q, k, v)
        ours = torch.autograd.grad(o, (q, k, v), grad)
    assert torch.equal(o, expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, grads, strict=True))


def test_a_second_derivative_is_refused_even_where_the_incoming_gradient_needs_none():
    q, k, v = inputs(1, 1, 1, 6, 6, 4)
    for loss in (lambda o: o.sum(), lambda o: o.square().sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss(flash_attention(q, k, v)), q, create_graph=True)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_that_nobody_needs_are_left_out(needed):
    q, k, v = inputs(1, 2, 1, 9, 9, 4)
    every = torch.autograd.grad(flash_attention(q, k, v).sin().sum(), (q, k, v))
    some = [x.detach().requires_grad_(i in needed) for i, x in enumerate((q, k, v))]
    flash_attention(*some).sin().sum().backward()
    for i, (x, grad) in enumerate(zip(some, every, strict=True)):
        assert (x.grad is None) == (i not in needed)
        if i in needed:
            torch.testing.assert_close(x.grad, grad)


@pytest.mark.parametrize("largest", [10.0, 1000.0, 10_000.0])
def test_recomputed_weights_lose_epsilon_times_the_largest_score(largest):
    """The range in which single precision holds: errors of gradients grow with the scores, and no faster."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 32, 8, dtype=torch.float64) for _ in range(3))
    scale = largest / (q @ k.mT).abs().max().item()
    grad = torch.randn(1, 1, 32, 8, dtype=torch.float64)

    def grads(dtype):
        each = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(flash_attention(*each, scale=scale), each, grad.to(dtype))

    # dV is a mean with the weights themselves, so its error is theirs.
    exact, single = grads(torch.float64)[2], grads(torch.float32)[2]
    error = (exact - single).abs().max().item() / exact.abs().max().item()
    assert error < 4 * largest * 2**-24 + 1e-6


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda q, k, v: (q, k, v[..., :0]), ValueError, "head dimension of at least 1"),
        (lambda q, k, v: (q.to(torch.float8_e4m3fn), k, v), TypeError, "float8_e4m3fn"),
    ],
)
def test_more_input_that_is_refused(change, error, message):
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    with pytest.raises(error, match=message):
        flash_attention(*change(q, k, v))


def test_longest_stops_where_memory_runs_out():
    def small_memory(q, k, v, causal):
        if q.shape[2] > 40:
            raise torch.OutOfMemoryError
        return flash_attention(q, k, v, causal)

    assert experiment.longest(small_memory, (10, 20, 40, 80, 160), 8, torch.device("cpu")) == 40
    assert experiment.longest(small_memory, (80,), 8, torch.device("cpu")) is None


def test_plain_against_ours_measures_both():
    found = experiment.plain_against_ours(1, 2, 512, 16, CPU, seconds=0.01)
    assert found["plain_ms"] > 0 and found["ours_ms"] > 0
    assert found["plain_bytes"] > 2 * found["ours_bytes"]


def test_frames_end_with_the_output_and_can_be_drawn():
    q, k, v = (draw((9, 4), i, torch.float32) for i in range(3))
    frames = pictures.sweep_frames(q, k, v, 0.5, 3)
    assert [(frame.rows[0], frame.columns[0]) for frame in frames] == [
        (0, 0), (3, 0), (3, 3), (6, 0), (6, 3), (6, 6)
    ]  # fmt: skip
    expected = plain_attention(q[None, None], k[None, None], v[None, None], True, 0.5)[0, 0]
    torch.testing.assert_close(frames[-1].output, expected)
    assert frames[1].output[:3].isfinite().all() and frames[1].output[3:].isnan().all()
    assert [("empty" in text, "written" in text) for text in map(pictures.caption, frames)] == [
        (True, True), (True, False), (False, True), (True, False), (False, False), (False, True)
    ]  # fmt: skip
    figure = Figure()
    pictures.draw_sweep(frames[2], q @ k.T * 0.5, figure, 1.0)
    assert len(figure.axes) == 5


def test_speed_can_be_drawn():
    row = dict(length=16, dim=64, causal=False, backend="ours", forward=1.0, backward=2.0)
    missing = dict(length=16, dim=64, causal=False, backend="SDPA cuDNN", reason="none")
    figure = Figure()
    pictures.draw_speed([row, missing], 64, figure)
    assert [len(axes.lines) for axes in figure.axes] == [1, 0, 1, 0]
