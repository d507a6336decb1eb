"""A linear map whose three products are computed in FP8, to be trained like any other.

    Decoder(config, linear=Float8Linear)                                    the whole recipe
    Decoder(config, linear=partial(Float8Linear, recipe=Recipe(gradient=BLOCK)))  one thing changed

Weights and gradients stay in float32, as the master copies they are. Embedding, head, norms and attention are no
linear maps of this kind in `Decoder`, so they stay as they are, as in DeepSeek-V3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from noise2tokens.fp8.codec import E4M3, Format
from noise2tokens.fp8.gemm import fast_gemm
from noise2tokens.fp8.scaling import BLOCK, TILE, Block, quantize, requantize, unpack

Map = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """Return x: nothing is rounded."""
    return x


def to_bfloat16(x: Tensor) -> Tensor:
    """Round to bfloat16 and come back.

    Products of such numbers are exact in float32, and tensor cores add them up in float32. So float32 products of
    rounded operands, rounded at the end, are bfloat16's but for the order of the sum, and faster on a CPU.
    """
    return x.bfloat16().to(x.dtype)


def cast(x: Tensor, multiplier: float | int = 1) -> Tensor:
    """Round to E4M3 after a multiplication with one constant, and divide by it again; what is too large saturates.

    The constant stands for float16's loss scaling: where the loss is multiplied by it, every gradient is. A power of
    two changes nothing else in float32.
    """
    x8 = (multiplier * x).clamp(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn)
    return unpack(x8).to(x.dtype) / multiplier


@dataclass(frozen=True)
class Recipe:
    """What shares a scale, and in which format; the defaults are DeepSeek-V3's (report, sections 3.3.1 and 3.3.2).

    A block is for the product in which its tensor first takes part, the summed axis last; in Wgrad, which sums over
    tokens, activations and gradients have it turned: 128×1 for 1×128.
    """

    activation: Block = TILE
    weight: Block = BLOCK
    gradient: Block = TILE  # for Dgrad
    gradient_wgrad: Block | None = (
        None  # for Wgrad, before it is turned; as `gradient` if not given
    )
    format: Format = E4M3
    gradient_format: Format = E4M3
    power_of_two: bool = True


class Float8Product(torch.autograd.Function):
    """x wᵀ and its two products of the backward pass, in FP8 (DeepSeek-V3 report, figure 6)."""

    @staticmethod
    def forward(ctx, x_TI: Tensor, w_OI: Tensor, recipe: Recipe) -> Tensor:
        options = {"format": recipe.format, "power_of_two": recipe.power_of_two}
        x8_TI = quantize(x_TI, recipe.activation, **options)
        w8_OI = quantize(w_OI, recipe.weight, **options)
        ctx.x8_TI, ctx.w8_OI, ctx.recipe = x8_TI, w8_OI, recipe
        return fast_gemm(x8_TI, w8_OI)  # Fprop: y = x wᵀ, summed over inputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        recipe, dx_TI, dw_OI = ctx.recipe, None, None
        scales = {"power_of_two": recipe.power_of_two}
        if ctx.needs_input_grad[0]:  # Dgrad: dx = dy w, summed over outputs
            dy8_TO = quantize(dy_TO, recipe.gradient, recipe.gradient_format, **scales)
            dx_TI = fast_gemm(dy8_TO, ctx.w8_OI.T)
        if ctx.needs_input_grad[1]:  # Wgrad: dw = dyᵀ x, summed over tokens
            block = recipe.gradient_wgrad or recipe.gradient
            dy8_OT = quantize(dy_TO.T, block, recipe.gradient_format, **scales)
            x8_IT = requantize(ctx.x8_TI.T, recipe.activation, recipe.format, **scales)
            dw_OI = fast_gemm(dy8_OT, x8_IT)
        return dx_TI, dw_OI, None


class Float8Linear(nn.Linear):
    """`nn.Linear` whose products Fprop, Dgrad and Wgrad are computed from FP8 values.

    Operands are rounded to FP8, and their products are summed in float32 (`fast_gemm`), not in a tensor core's narrow
    register. What is kept for the backward pass is FP8 too: x, and w as quantized in the forward pass.

    Args:
        inputs, outputs, bias: As for `nn.Linear`.
        recipe: What shares a scale.

    Source: DeepSeek-V3 report, figure 6.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, recipe: Recipe | None = None):
        super().__init__(inputs, outputs, bias=bias)
        self.recipe = recipe or Recipe()

    def forward(self, x: Float[Tensor, "*B inputs"]) -> Float[Tensor, "*B outputs"]:
        """Return x wᵀ + bias in the type of x."""
        y = Float8Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.recipe)
        y = y.view(*x.shape[:-1], -1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class RoundedProduct(torch.autograd.Function):
    """x wᵀ and its two products of the backward pass in float32, of operands that are rounded first, each by itself."""

    @staticmethod
    def forward(
        ctx, x_TI: Tensor, w_OI: Tensor, operand: Map, gradient: Map, result: Map
    ) -> Tensor:
        x_TI, w_OI = operand(x_TI), operand(w_OI)
        ctx.save_for_backward(x_TI, w_OI)
        ctx.gradient, ctx.result = gradient, result
        return result(x_TI @ w_OI.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, w_OI = ctx.saved_tensors
        dy_TO = ctx.gradient(dy_TO)
        dx_TI = ctx.result(dy_TO @ w_OI) if ctx.needs_input_grad[0] else None
        dw_OI = ctx.result(dy_TO.T @ x_TI) if ctx.needs_input_grad[1] else None
        return dx_TI, dw_OI, None, None, None


class RoundedLinear(nn.Linear):
    """`nn.Linear` whose three products have their operands rounded by functions that are given: what FP8 replaces.

        partial(RoundedLinear, operand=to_bfloat16, gradient=to_bfloat16, result=to_bfloat16)
        partial(RoundedLinear, operand=cast, gradient=cast)         the plain attempt
        partial(RoundedLinear, gradient=torch.zeros_like)           a control: nothing comes back through the map

    Args:
        inputs, outputs, bias: As for `nn.Linear`.
        operand: Rounds x and w.
        gradient: Rounds dy, for both products of the backward pass.
        result: Rounds the products.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = True,
        *,
        operand: Map = same,
        gradient: Map = same,
        result: Map = same,
    ):
        super().__init__(inputs, outputs, bias=bias)
        self.rounding = operand, gradient, result

    def forward(self, x: Float[Tensor, "*B inputs"]) -> Float[Tensor, "*B outputs"]:
        """Return x wᵀ + bias in the type of x."""
        y = RoundedProduct.apply(x.reshape(-1, x.shape[-1]).float(), self.weight, *self.rounding)
        y = y.view(*x.shape[:-1], -1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)
