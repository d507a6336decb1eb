"""Chapter 14: codes held against PyTorch's types, products against its FP8 kernel, gradients to a bound."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from noise2tokens.fp8 import experiment, gemm
from noise2tokens.fp8.codec import E4M3, E5M2, E5M6, Format, decode, encode, rounded
from noise2tokens.fp8.linear import Float8Linear, Recipe, RoundedLinear, cast, to_bfloat16
from noise2tokens.fp8.scaling import (
    BLOCK,
    COLUMN_TILE,
    ROW,
    TENSOR,
    TILE,
    quantize,
    relative_error,
    requantize,
    unpack,
)
from noise2tokens.transformer import Config, Decoder, next_token_loss

BFloat16Linear = partial(
    RoundedLinear, operand=to_bfloat16, gradient=to_bfloat16, result=to_bfloat16
)

# A format, PyTorch's type, and the integer type of the same size.
TYPES = [
    (E4M3, torch.float8_e4m3fn, torch.uint8),
    (E5M2, torch.float8_e5m2, torch.uint8),
    (Format(5, 10), torch.float16, torch.int16),
    (Format(8, 7), torch.bfloat16, torch.int16),
]
each_type = pytest.mark.parametrize(("format", "dtype", "integer"), TYPES, ids=str)


# Codes


@each_type
def test_every_code_stands_for_what_pytorchs_type_says(format, dtype, integer):
    codes = torch.arange(2**format.bits)
    theirs = codes.to(integer).view(dtype).double()
    ours = decode(codes, format)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0, 7, -7), theirs.nan_to_num(0, 7, -7))
    assert torch.equal(ours.signbit()[~ours.isnan()], theirs.signbit()[~ours.isnan()])
    info = torch.finfo(dtype)
    assert (format.largest, format.smallest_normal) == (info.max, info.smallest_normal)
    assert format.smallest == ours[ours > 0].min()


@each_type
def test_encode_inverts_decode(format, dtype, integer):
    codes = torch.arange(2**format.bits)
    finite = decode(codes, format).isfinite()
    assert torch.equal(encode(decode(codes, format), format)[finite], codes[finite])


@each_type
def test_rounding_is_pytorchs_between_and_halfway_between_all_neighbors(format, dtype, integer):
    positive = decode(torch.arange(2 ** (format.bits - 1)), format)
    positive = positive[positive.isfinite()]
    halfway = (positive[1:] + positive[:-1]) / 2  # exact in float64, and in float32 for FP8
    noise = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = noise * 2.0 ** torch.linspace(-30, 20, len(noise), dtype=torch.float64)
    x = torch.cat([halfway, halfway * (1 + 1e-6), halfway * (1 - 1e-6), positive, spread])
    x = torch.cat([x, -x]).float().clamp(-format.largest, format.largest)
    assert torch.equal(rounded(x, format), x.to(dtype).double())
    assert torch.equal(rounded(x, format).signbit(), x.to(dtype).double().signbit())


@pytest.mark.parametrize("format", [E4M3, E5M2, E5M6])
def test_what_is_too_large_saturates_and_nan_is_kept(format):
    x = torch.tensor([math.inf, -math.inf, 1e30, -1e30, format.largest * 1.2, math.nan])
    found = rounded(x, format)
    assert (found[:5].abs() == format.largest).all() and found[5].isnan()
    assert torch.equal(found[:5].sign(), x[:5].sign().double())


def test_published_ranges():
    """Micikevicius et al. 2022, table 1."""
    assert (E4M3.largest, E4M3.smallest_normal, E4M3.smallest) == (448, 2**-6, 2**-9)
    assert (E5M2.largest, E5M2.smallest_normal, E5M2.smallest) == (57344, 2**-14, 2**-16)
    assert decode(torch.arange(256), E4M3).isnan().sum() == 2
    assert decode(torch.arange(256), E5M2).isnan().sum() == 6
    assert decode(torch.arange(256), E5M2).isinf().sum() == 2
    assert E5M6.bits == 12


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(1, 5),
    st.booleans(),
    st.floats(-(2.0**40), 2.0**40),
)
def test_nothing_is_nearer_than_what_any_format_rounds_to(exponent, mantissa, ieee, number):
    format = Format(exponent, mantissa, ieee)
    x = torch.tensor([number], dtype=torch.float64).clamp(-format.largest, format.largest)
    found = rounded(x, format)
    codes = decode(torch.arange(2**format.bits), format)
    nearest = (codes[codes.isfinite()] - x).abs().min()
    assert (found - x).abs() == nearest
    assert torch.equal(rounded(found, format), found)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Format(1, 3),
        lambda: Format(4, 0),
        lambda: Format(9, 3),
        lambda: decode(torch.tensor([256]), E4M3),
        lambda: decode(torch.tensor([-1]), E4M3),
        lambda: quantize(torch.ones(2, 2), (0, 1)),
        lambda: quantize(torch.ones(2, 2), (1, -1)),
        lambda: quantize(torch.ones(2, 2), TILE, E5M6),
        lambda: quantize(torch.ones(0, 2), TILE),
        lambda: gemm.chop(torch.ones(2), 0),
        lambda: gemm.accumulate(torch.ones(2, 4), torch.ones(2, 5)),
        lambda: gemm.accumulate(torch.ones(2, 4), torch.ones(2, 4), promote=48),
        lambda: gemm.accumulate(torch.ones(2, 4), torch.ones(2, 4), group=0),
        lambda: gemm.accumulate(torch.ones(2, 4), torch.ones(2, 4), align="group"),
        lambda: gemm.gemm(quantize(torch.ones(2, 4), (1, 2)), quantize(torch.ones(2, 4), (1, 4))),
        lambda: gemm.gemm(quantize(torch.ones(2, 4), (1, 4)), quantize(torch.ones(2, 8), (1, 4))),
        lambda: relative_error(torch.ones(2), torch.zeros(2)),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"got|relative"):
        call()


# Scales


def outlying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Numbers of very different sizes, by row and by column."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    sizes = torch.randn(rows, 1, generator=generator) + torch.randn(1, columns, generator=generator)
    return x * torch.exp(3 * sizes)


@pytest.mark.parametrize("format", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", [TENSOR, ROW, TILE, COLUMN_TILE, BLOCK, (3, 5), (1, 1)], ids=str)
def test_each_block_is_scaled_and_rounded_by_itself(block, format, power_of_two):
    x = outlying(130, 261)
    found = quantize(x, block, format, power_of_two=power_of_two)
    rows, columns = (side or size for side, size in zip(block, x.shape, strict=True))
    dequantized = found.dequantize()
    some = max(1, found.scales.numel() // 50)  # of many blocks, a sample
    for i, top in enumerate(range(0, 130, rows)):
        for j, left in enumerate(range(0, 261, columns)):
            if (i + 7 * j) % some:
                continue
            where = slice(top, top + rows), slice(left, left + columns)
            scale = found.scales[i, j]
            exact = x[where].abs().max() / format.largest
            if power_of_two:
                assert torch.frexp(scale).mantissa == 0.5
                assert exact <= scale < 2 * exact
            else:
                assert scale == exact
            expected = rounded((x[where] / scale), format).float()
            assert torch.equal(found.values[where].float(), expected)
            assert torch.equal(dequantized[where], expected * scale)
    assert found.scales.shape == (math.ceil(130 / rows), math.ceil(261 / columns))


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_a_scale_that_is_a_power_of_two_already_stays(format):
    x = torch.tensor([[format.largest * 2.0**-40], [format.largest * 2.0**30]])
    scales = quantize(x, ROW, format, power_of_two=True).scales
    assert scales.tolist() == [[2.0**-40], [2.0**30]]
    above = torch.nextafter(x, 2 * x)
    assert quantize(above, ROW, format, power_of_two=True).scales.tolist() == [
        [2.0**-39],
        [2.0**31],
    ]


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_the_largest_comes_to_the_largest_and_never_beyond(format):
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)) * 1e5
    values = quantize(x, ROW, format).values.float()
    assert (values.abs() == format.largest).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_values_are_unpacked_as_pytorch_casts_them(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
    for x in (values, values.T):
        assert torch.equal(unpack(x).nan_to_num(-7), x.float().nan_to_num(-7))


def test_a_transposed_matrix_is_the_matrix_transposed():
    x = quantize(outlying(70, 140), (16, 128))
    assert torch.equal(x.T.dequantize(), x.dequantize().T)
    assert x.T.block == (128, 16)


def test_zeros_and_tiny_numbers_do_not_divide_by_zero():
    x = torch.zeros(2, 256)
    x[1, 128:] = 1e-42
    for power_of_two in (False, True):
        found = quantize(x, TILE, power_of_two=power_of_two)
        assert (found.scales > 0).all()
        assert torch.equal(found.dequantize()[:, :128], x[:, :128])
        assert found.dequantize().isfinite().all()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_spoils_its_block_visibly_and_no_other(bad, power_of_two):
    x = torch.ones(2, 256)
    x[0, 3] = bad
    found = quantize(x, TILE, power_of_two=power_of_two).dequantize()
    assert not found[0, :128].isfinite().any()
    assert torch.equal(found[0, 128:], x[0, 128:]) and torch.equal(found[1], x[1])


def test_powers_of_two_let_tiles_be_turned_without_rounding_twice():
    """As long as nothing falls below the smallest normal number of its new tile, where bits are lost."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    x = x.sign() * x.abs().clamp_min(0.01)
    once = quantize(x, TILE, power_of_two=True)
    twice = requantize(once, COLUMN_TILE, power_of_two=True)
    assert torch.equal(twice.dequantize(), once.dequantize())
    once = quantize(x, TILE)
    twice = requantize(once, COLUMN_TILE)
    assert relative_error(twice.dequantize(), once.dequantize()) > 0.01
    far = x.clone()
    far[0] *= 1e6  # now rows differ so much that a column's tile loses its small numbers
    once = quantize(far, TILE, power_of_two=True)
    twice = requantize(once, COLUMN_TILE, power_of_two=True)
    assert not torch.equal(twice.dequantize()[1:], once.dequantize()[1:])


@pytest.mark.parametrize(("format", "bits"), [(E4M3, 3), (E5M2, 2)])
def test_error_is_what_a_uniform_logarithm_predicts(format, bits):
    """Steps of 2^-M in [1, 2): mean square over a uniform logarithm is 4^-M / 12 times the mean of 1/x²."""
    generator = torch.Generator().manual_seed(0)
    x = torch.exp2(torch.rand(200, 1000, generator=generator) * 6)
    error = (quantize(x, TENSOR, format).dequantize() / x - 1).square().mean().sqrt()
    assert error.item() == pytest.approx(2**-bits * math.sqrt(3 / 8 / math.log(2) / 12), rel=0.01)


# Products


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("block_a", "block_b"), [(TILE, BLOCK), (ROW, ROW), (TENSOR, TENSOR), (TILE, TILE)], ids=str
)
def test_products_by_stretches_are_those_of_the_numbers_stood_for(block_a, block_b, power_of_two):
    a = quantize(outlying(40, 300, 1), block_a, power_of_two=power_of_two)
    b = quantize(outlying(150, 300, 2), block_b, power_of_two=power_of_two)
    exact = a.dequantize().double() @ b.dequantize().double().T
    assert relative_error(gemm.gemm(a, b), exact) < 1e-6
    assert relative_error(gemm.fast_gemm(a, b), exact) < 1e-6
    slow = gemm.gemm(a, b, bits=40)
    assert relative_error(slow, exact) < 1e-6


@pytest.mark.parametrize("block", [TENSOR, ROW], ids=str)
def test_products_are_those_of_pytorchs_fp8_kernel(block):
    a, b = quantize(outlying(32, 64, 1), block), quantize(outlying(48, 64, 2), block)
    theirs = torch._scaled_mm(
        a.values, b.values.T, scale_a=a.scales, scale_b=b.scales.T, out_dtype=torch.float32
    )
    assert relative_error(gemm.gemm(a, b), theirs) < 1e-5
    assert relative_error(gemm.fast_gemm(a, b), theirs) < 1e-5


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e6, 1e6, allow_subnormal=False), st.integers(1, 20))
def test_chop_keeps_so_many_bits(number, bits):
    x = torch.tensor([number], dtype=torch.float64)
    cut, near = gemm.chop(x, bits).item(), gemm.chop(x, bits, nearest=True).item()
    if number == 0:
        assert cut == near == 0
        return
    step = 2.0 ** (math.frexp(number)[1] - bits)
    assert cut == math.trunc(number / step) * step
    assert near == round(number / step) * step


def test_chop_is_float32s_rounding_at_24_bits():
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gemm.chop(x, 24, nearest=True), x.float().double())
    assert torch.equal(gemm.chop(x, 8, nearest=True), x.float().bfloat16().double())


def test_register_is_a_running_sum_cut_off_after_each_group():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(1, 96, generator=generator), torch.rand(1, 96, generator=generator)
    products = (a.double() * b.double())[0]
    register, total = 0.0, 0.0
    for start in range(0, 96, 16):
        value = register + products[start : start + 16].sum().item()
        step = 2.0 ** (math.frexp(value)[1] - 9)
        register = math.floor(value / step) * step
        if start % 32 == 16:
            total, register = total + register, 0.0
    found = gemm.accumulate(a, b, bits=9, group=16, promote=32).item()
    assert found == pytest.approx(total, rel=1e-7)
    assert gemm.accumulate(a, b, bits=50).item() == pytest.approx(products.sum().item(), rel=1e-12)


def test_terms_are_cut_at_the_bits_of_the_largest_before_they_are_added():
    terms = torch.tensor([[1.75, 0.3, -0.3, 0.0], [5.0, 0.9, 0.9, 0.9], [0.0, 0.0, 0.0, 0.0]])
    # Three bits: of 1.75 steps of 1/4, which leave ±0.25 of ±0.3; of 5 steps of 1, which leave nothing of 0.9.
    assert gemm.aligned_sum(terms, 3).tolist() == [1.75, 5.0, 0.0]
    assert gemm.aligned_sum(terms[:, :2], 3).tolist() == [2.0, 5.0, 0.0]


@pytest.mark.parametrize("align", ["products", "register"])
def test_aligned_products_are_cut_one_by_one(align):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 96, generator=generator) for _ in range(2))
    products = (a.double() * b.double())[0].tolist()
    register, total = 0.0, 0.0
    for start in range(0, 96, 16):
        terms = products[start : start + 16]
        outside = register
        if align == "register":
            terms, outside = [*terms, register], 0.0
        step = 2.0 ** (max(math.frexp(term)[1] for term in terms) - 9)
        value = outside + sum(math.trunc(term / step) * step for term in terms)
        step = 2.0 ** (math.frexp(value)[1] - 9)
        register = math.trunc(value / step) * step
        if start % 32 == 16:
            total, register = total + register, 0.0
    found = gemm.accumulate(a, b, bits=9, group=16, promote=32, align=align).item()
    assert found == pytest.approx(total, rel=1e-7)
    wide = gemm.accumulate(a, b, bits=50, align=align).item()
    assert wide == pytest.approx(sum(products), rel=1e-12)


def test_a_register_that_is_aligned_with_products_loses_as_if_each_were_a_group():
    """U(0,1): an upper estimate, since products of E4M3 are short and often have nothing to cut off."""
    generator = torch.Generator().manual_seed(0)
    a, b = (rounded(torch.rand(8, 4096, generator=generator), E4M3) for _ in range(2))
    loss = {align: relative_error(gemm.accumulate(a, b, align=align), a @ b.T)
            for align in (None, "products", "register")}  # fmt: skip
    assert loss["products"] == pytest.approx(loss[None], rel=0.01)
    assert 0.6 < loss["register"] / (4096 / 3 / 2**14) < 1
    promoted = relative_error(gemm.accumulate(a, b, align="register", promote=128), a @ b.T)
    assert 3e-4 < promoted < 1e-3


def test_what_a_narrow_register_loses_grows_with_the_length_and_not_with_promotion():
    """U(0,1): each cut loses half a step on average; 128 groups of a growing sum lose 0.3 %, 4 groups 0.01 %."""
    generator = torch.Generator().manual_seed(0)
    a = rounded(torch.rand(16, 4096, generator=generator), E4M3)
    b = rounded(torch.rand(16, 4096, generator=generator), E4M3)
    exact = a @ b.T
    plain = relative_error(gemm.accumulate(a, b), exact)
    promoted = relative_error(gemm.accumulate(a, b, promote=128), exact)
    nearest = relative_error(gemm.accumulate(a, b, nearest=True), exact)
    assert 2e-3 < plain < 4.5e-3
    assert 5e-5 < promoted < 2e-4
    assert nearest < plain / 4
    half = relative_error(gemm.accumulate(a[:, :2048], b[:, :2048]), a[:, :2048] @ b[:, :2048].T)
    assert plain / half == pytest.approx(2, rel=0.2)


# The linear map


def three_products(linear: nn.Linear, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(dy)
    return [y.detach(), x.grad, linear.weight.grad]


def operands(tokens=200, inputs=160, outputs=144):
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, inputs), (outputs, inputs), (tokens, outputs)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_three_products_are_those_of_the_quantized_operands():
    x, w, dy = operands()
    layer = Float8Linear(160, 144, bias=False)
    layer.weight.data.copy_(w)
    found = three_products(layer, x, dy)
    scaled = partial(quantize, power_of_two=True)
    x8, w8, dy8 = scaled(x, TILE), scaled(w, BLOCK), scaled(dy, TILE)
    turned = scaled(scaled(x, TILE).dequantize(), COLUMN_TILE).dequantize()
    dy8_wgrad = scaled(dy, COLUMN_TILE).dequantize()
    expected = [
        x8.dequantize() @ w8.dequantize().T,
        dy8.dequantize() @ w8.dequantize(),
        dy8_wgrad.T @ turned,
    ]
    for ours, exact in zip(found, expected, strict=True):
        assert relative_error(ours, exact) < 1e-6


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        (Recipe(), 0.0265),
        (Recipe(power_of_two=False), 0.0265),
        (Recipe(format=E5M2, gradient_format=E5M2), 0.053),
    ],
)
def test_products_err_as_two_independent_roundings_predict(recipe, error):
    """Of independent operands of mean zero, a product errs by √2 times the relative error of one rounding."""
    x, w, dy = operands()
    exact = nn.Linear(160, 144, bias=False)
    ours = Float8Linear(160, 144, bias=False, recipe=recipe)
    for layer in (exact, ours):
        layer.weight.data.copy_(w)
    pairs = list(zip(three_products(ours, x, dy), three_products(exact, x, dy), strict=True))
    for i, (found, wanted) in enumerate(pairs):
        # In Wgrad x is rounded a second time, where its scales are no powers of two.
        roundings = 3 if i == 2 and not recipe.power_of_two else 2
        assert relative_error(found, wanted) == pytest.approx(math.sqrt(roundings) * error, rel=0.1)


def rounded_linear(**rounding) -> tuple[RoundedLinear, list[torch.Tensor]]:
    x, w, dy = operands()
    layer = RoundedLinear(160, 144, bias=False, **rounding)
    layer.weight.data.copy_(w)
    return layer, three_products(layer, x, dy)


def test_the_plain_attempt_casts_all_operands_and_loses_small_gradients():
    x, w, dy = operands()
    layer, found = rounded_linear(operand=cast, gradient=cast)
    x8, w8, dy8 = (rounded(a, E4M3).float() for a in (x, w, dy))
    for ours, exact in zip(found, [x8 @ w8.T, dy8 @ w8, dy8.T @ x8], strict=True):
        assert relative_error(ours, exact) < 1e-6
    layer.weight.grad = None
    assert not any(grad.any() for grad in three_products(layer, x, 1e-4 * dy)[1:])
    assert layer(1e6 * x).isfinite().all()


def test_a_constant_is_the_loss_multiplied_by_it():
    """A cast of 2^k dy, divided by 2^k, is what a plain cast gives for a loss that is 2^k times as large."""
    x, w, dy = operands()
    _, plain = rounded_linear(operand=cast, gradient=cast)
    layer, _ = rounded_linear(operand=cast, gradient=partial(cast, multiplier=2.0**14))
    layer.weight.grad = None
    found = three_products(layer, x, 2.0**-14 * dy)
    for ours, scaled in zip(found[1:], plain[1:], strict=True):
        assert torch.equal(2.0**14 * ours, scaled)
    assert torch.equal(cast(torch.tensor([1e9, -1e9]), 2.0), torch.tensor([224.0, -224.0]))


def test_rounding_to_bfloat16_is_pytorchs_linear_map_in_bfloat16():
    """Up to the order of sums in float32, which moves a result by one of its last bits at most now and then."""
    x, w, dy = operands()
    _, found = rounded_linear(operand=to_bfloat16, gradient=to_bfloat16, result=to_bfloat16)
    x, w = x.bfloat16().requires_grad_(), w.bfloat16().requires_grad_()
    y = F.linear(x, w)
    y.backward(dy.bfloat16())
    for ours, theirs in zip(found, [y.detach(), x.grad, w.grad], strict=True):
        assert torch.equal(ours, ours.bfloat16().float())
        assert relative_error(ours, theirs) < 5e-4
        assert (ours != theirs.float()).float().mean() < 0.02
    exact = operands()[0] @ operands()[1].T
    assert relative_error(found[0], exact) > 2e-3  # the bound above tells it from float32


def test_the_control_has_its_products_and_no_gradient():
    x, w, _ = operands()
    _, found = rounded_linear(operand=cast, gradient=torch.zeros_like)
    assert relative_error(found[0], cast(x) @ cast(w).T) < 1e-6
    assert not found[1].any() and not found[2].any()
    _, found = rounded_linear()
    _, _, dy = operands()
    for ours, exact in zip(found, [x @ w.T, dy @ w, dy.T @ x], strict=True):
        assert torch.equal(ours, exact)


def test_rounded_linear_is_a_linear_map_to_its_caller():
    layer, plain = RoundedLinear(8, 6), nn.Linear(8, 6)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8)
    assert torch.allclose(layer(x), plain(x), atol=1e-6) and layer(x[0, 0]).shape == (6,)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad.allclose(torch.full((6,), 6.0))


def test_each_part_of_the_recipe_is_about_its_own_tensor():
    x, w, dy = operands()

    def changed(**options) -> list[bool]:
        runs = []
        for recipe in (Recipe(), Recipe(**options)):
            layer = Float8Linear(160, 144, bias=False, recipe=recipe)
            layer.weight.data.copy_(w)
            runs.append(three_products(layer, x, dy))
        return [not torch.equal(a, b) for a, b in zip(*runs, strict=True)]

    assert changed(activation=TENSOR, power_of_two=False) == [True, True, True]
    assert changed(weight=(1, 32)) == [True, True, False]
    assert changed(gradient_format=E5M2) == [False, True, True]
    assert changed(format=E5M2) == [True, True, True]
    # Powers of two for a common scale change little here, so a tensor of very unequal rows tells blocks apart.
    dy = dy * torch.logspace(0, -7, len(dy))[:, None]
    assert changed(gradient=BLOCK, gradient_wgrad=TILE) == [False, True, False]
    assert changed(gradient_wgrad=TENSOR) == [False, False, True]


def test_float8_linear_is_a_linear_map_to_its_caller():
    layer = Float8Linear(8, 6)
    plain = nn.Linear(8, 6)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8)
    assert layer(x).shape == (2, 3, 6) and layer(x[0, 0]).shape == (6,)
    assert torch.allclose(layer(x), plain(x), atol=0.3)
    assert layer(torch.zeros(1, 8)).allclose(plain.bias)
    assert Float8Linear(8, 6, bias=False)(x.bfloat16()).dtype == torch.bfloat16
    layer(x).sum().backward()
    assert layer.bias.grad.allclose(torch.full((6,), 6.0))


def test_what_is_kept_for_the_backward_pass_is_eight_bits():
    layer = Float8Linear(128, 128, bias=False)
    y = layer(torch.randn(64, 128, requires_grad=True))
    node = y.grad_fn
    while not hasattr(node, "x8_TI"):
        node = node.next_functions[0][0]
    assert node.x8_TI.values.dtype == node.w8_OI.values.dtype == torch.float8_e4m3fn
    assert not node.saved_tensors


@pytest.mark.parametrize(("linear", "bound"), [(Float8Linear, 0.12), (BFloat16Linear, 0.012)])
def test_a_decoders_gradients_are_near_those_of_float32(linear, bound):
    config = Config(257, 64, 2, 4)
    torch.manual_seed(0)
    exact, ours = Decoder(config), Decoder(config, linear=linear)
    ours.load_state_dict(exact.state_dict())
    tokens = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(1))
    for model in (exact, ours):
        next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    errors = [
        relative_error(a.grad, b.grad)
        for a, b in zip(ours.parameters(), exact.parameters(), strict=True)
    ]
    assert 0 < max(errors) < bound
    assert type(ours.head) is nn.Linear
    kinds = [m for m in ours.modules() if isinstance(m, Float8Linear | RoundedLinear)]
    assert len(kinds) == 2 * (4 + 3)


# The experiment


def test_unknown_ways_are_refused():
    with pytest.raises(ValueError, match="got 'fp4'"):
        experiment.linear_of("fp4")


def test_each_way_is_what_its_name_says():
    made = {way: experiment.linear_of(way)(4, 4) for way in experiment.WAYS}
    recipes = {way: layer.recipe for way, layer in made.items() if isinstance(layer, Float8Linear)}
    assert recipes == {
        "float8": Recipe(TILE, BLOCK, TILE, power_of_two=True),
        "float8, a scale a tensor": Recipe(TENSOR, TENSOR, TENSOR),
        "float8, gradients in E5M2": Recipe(format=E4M3, gradient_format=E5M2),
        "float8, gradients by blocks": Recipe(gradient=BLOCK),
    }
    assert recipes["float8"] == Recipe()
    x = torch.tensor([0.3, 1e-5, 1000.0])
    casts = [0.3125, 0.0, 448.0]
    near = x.bfloat16().float().tolist()
    wanted = {
        "bfloat16": (near, near, near),
        "cast": (casts, casts, x.tolist()),
        "cast, no gradient": (casts, [0.0] * 3, x.tolist()),
    }
    found = {
        way: tuple(round_(x).tolist() for round_ in layer.rounding)
        for way, layer in made.items()
        if isinstance(layer, RoundedLinear)
    }
    constant = found["cast, loss times 2¹⁴"][1]
    assert constant == (rounded(x * 2**14, E4M3) / 2**14).tolist() and constant[1] > 0
    wanted["cast, loss times 2¹⁴"] = (casts, constant, x.tolist())
    assert found == wanted
    assert type(made["float32"]) is nn.Linear and len(made) == 1 + len(recipes) + len(found)


def test_trainings_start_alike_and_differ_by_their_rounding():
    sizes = dict(width=16, layers=1, heads=2)
    text = experiment.source_code(torch.device("cpu"), 32, 4)
    models = {way: experiment.make_model(way, seed=0, **sizes) for way in experiment.WAYS}
    first = models["float32"].state_dict()
    for model in models.values():
        assert all(torch.equal(first[name], value) for name, value in model.state_dict().items())
    losses = {
        way: experiment.train_one(way, text, seed=0, steps=3, batch_size=2, length=32, **sizes)
        for way in ("float32", "float8")
    }
    again = experiment.train_one("float8", text, seed=0, steps=3, batch_size=2, length=32, **sizes)
    assert losses["float8"] == again
    assert 0 < abs(losses["float8"] / losses["float32"] - 1) < 0.05


def test_errors_relative_to_a_reference_and_their_floor():
    losses = {"float32": [2.0, 2.2], "float8": [2.02, 2.178]}
    found = experiment.relative_losses(losses)
    assert found["float8"] == pytest.approx([0.01, -0.01])
    assert experiment.relative_losses(losses | {"float8": [2.02]})["float8"] == [
        pytest.approx(0.01)
    ]
    with pytest.raises(ValueError, match="argument"):
        experiment.relative_losses(losses | {"float8": [2.02] * 3})
    assert experiment.seed_floor([2.0, 2.2]) == pytest.approx(0.2 / 2.1)


def test_outliers_hurt_those_that_share_their_scale():
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    found = experiment.outlier_errors(x, (1.0, 1e7))
    for errors in found.values():
        whole = errors.pop("integers, tensor")
        assert 0.008 < whole[0] < 0.013 and whole[1] == 1
        assert all(curve[0] == pytest.approx(0.026, abs=0.003) for curve in errors.values())
    last = {place: [curve[1] for curve in errors.values()] for place, errors in found.items()}
    # One scale, 128×128, a row, 1×128: the root of the share of those that are lost, and of δ² for the rest.
    shares = {
        "an entry": (1, 1 / 4, 1 / 256, 1 / 512),
        "a channel": (1, 1 / 2, 1, 1 / 2),
        "a token": (1, 1 / 2, 0, 0),
    }
    for place, wanted in shares.items():
        expected = [math.sqrt(share + (1 - share) * 0.026**2) for share in wanted]
        assert last[place] == pytest.approx(expected, rel=0.08)


def test_integers_have_one_step():
    x = torch.tensor([[127.0, 1.4, -0.6, 0.4]])
    assert experiment.integers(x).tolist() == [[127, 1, -1, 0]]
    assert experiment.integers(-x / 4).tolist() == [[-31.75, -0.25, 0.25, 0]]


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_long_sums_err_as_their_register_does(draw):
    found = experiment.accumulation_errors((256, 1024), seed=3, size=8, draw=draw)
    generator = torch.Generator().manual_seed(3)
    options = {
        "14 bits": {},
        "to the nearest": {"nearest": True},
        "promoted": {"promote": 128},
        "products aligned": {"align": "products"},
        "products and register aligned": {"align": "register"},
        "the same, promoted": {"align": "register", "promote": 128},
    }
    for i, length in enumerate((256, 1024)):
        a, b = (rounded(draw(8, length, generator=generator), E4M3) for _ in range(2))
        for name, choice in options.items():
            sums = gemm.accumulate(a, b, **choice)
            relative = (sums / (a @ b.T) - 1).abs()
            values = [found[name][key][i] for key in ("mean", "largest", "norm")]
            norm = relative_error(sums, a @ b.T)
            assert values == pytest.approx([relative.mean().item(), relative.max().item(), norm])
    assert list(found) == list(options)


def test_a_format_of_float32s_size_rounds_nothing():
    x, *_ = operands(8, 16, 4)
    assert torch.equal(rounded(x, Format(8, 23)).float(), x)


def test_operands_are_what_the_gradients_of_weights_are_products_of():
    text = experiment.source_code(torch.device("cpu"), 32, 4)
    model = experiment.make_model("float32", seed=0, width=16, layers=2, heads=2)
    found = experiment.operands(model, text, rows=64)
    assert all(parameter.grad is None for parameter in model.parameters())
    next_token_loss(model(text.inputs[:2]), text.targets[:2]).backward()
    maps = dict(model.blocks.named_modules())
    assert len(found) == 2 * 7
    for name, one in found.items():
        # The query of a window's first token, which has one key, changes nothing.
        assert len(one["x"]) == len(one["dy"]) == (62 if name.endswith("query") else 64)
        assert torch.equal(one["w"], maps[name].weight)
        assert torch.allclose(one["dy"].T @ one["x"], maps[name].weight.grad, atol=1e-7)


def test_gradient_errors_are_of_the_products_and_count_what_is_lost():
    x, w, dy = operands(256, 128, 128)
    dy = dy * torch.logspace(0, -9, len(dy))[:, None]
    one = {"x": x, "w": w, "dy": dy}
    found = experiment.gradient_errors({"a": one, "b": one})
    back = quantize(dy, TENSOR, power_of_two=True).dequantize()
    by_token = sorted(relative_error(a, b) for a, b in zip(back, dy, strict=True))
    assert found["tensor"] == pytest.approx(
        {
            "dy": relative_error(back, dy),
            "median token": by_token[127],
            "worst token": by_token[-1],
            "Dgrad": relative_error(back @ w, dy @ w),
            "Wgrad": relative_error(back.T @ x, dy.T @ x),
            "lost": (back == 0).float().mean().item(),
        }
    )
    assert found["tile 1×128"]["lost"] == 0 < 0.1 < found["tensor"]["lost"]
    worst = {name: row["worst token"] for name, row in found.items()}
    assert worst["tile 1×128"] < 0.04 < 0.06 < worst["column 128×1"] < 0.9 < worst["tensor"]


def test_validation_is_the_mean_over_all_targets_however_it_is_split():
    text = experiment.source_code(torch.device("cpu"), 32, 5)
    model = experiment.make_model("float32", seed=0, width=16, layers=1, heads=2)
    whole = next_token_loss(model(text.inputs), text.targets).item()
    for size in (2, 5):
        assert experiment.validation_loss(model, text, size) == pytest.approx(whole, rel=1e-5)


def test_frozen_weights_and_inputs_get_no_gradient_and_cost_the_others_none():
    x, w, dy = operands()
    layer = Float8Linear(160, 144, bias=False)
    layer.weight.data.copy_(w)
    wanted = three_products(layer, x, dy)
    layer.weight.grad = None
    layer(x).backward(dy)
    assert torch.equal(layer.weight.grad, wanted[2])
    layer.weight.requires_grad_(False).grad = None
    found = x.clone().requires_grad_()
    layer(found).backward(dy)
    assert torch.equal(found.grad, wanted[1]) and layer.weight.grad is None


def test_the_seed_decides_the_windows_too(monkeypatch):
    text = experiment.source_code(torch.device("cpu"), 32, 4)
    model = experiment.make_model
    monkeypatch.setattr(
        experiment, "make_model", lambda way, *, seed, **sizes: model(way, seed=0, **sizes)
    )
    sizes = dict(steps=1, batch_size=2, length=32, width=16, layers=1, heads=2)
    losses = [experiment.train_one("float32", text, seed=seed, **sizes) for seed in (0, 1)]
    assert losses[0] != losses[1]
