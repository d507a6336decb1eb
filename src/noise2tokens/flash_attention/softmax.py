"""Softmax, from three passes over a row to one state that can be merged.

The weights of attention are a softmax, and a softmax seems to need the whole row: its largest score, its sum, and
only then its values. This file takes that need apart in four steps, each a function:

1. `three_pass`: the safe softmax as it is usually written: find the maximum, sum the exponentials, divide.
2. `online`: maximum and sum in the same pass; when the maximum grows, the old sum is rescaled.
3. `one_pass`: what attention wants is not the weights but their product with the values, so the sum of values is
   carried along and rescaled in the same way. Nothing of the row is kept.
4. `block_state` and `merge`: the same state for a whole block of scores at once, and the rule that joins the
   states of two blocks. `merge` is associative and commutative and has an identity, so a row may be cut anywhere,
   and its parts computed in any order and on any machine.

Every function works on many rows at once; the row that is softmaxed is the last axis of `scores`.

Letters: m is the running maximum, ell the running denominator relative to exp(m), o the running sum of values
relative to exp(m), not yet divided.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

NEVER = float("-inf")  # the score of a key that a query may not see


class SoftmaxState(NamedTuple):
    """What is known of softmax(scores) @ values after some of the keys: (m, ell, o)."""

    m: Float[Tensor, "*rows"]
    ell: Float[Tensor, "*rows"]
    o: Float[Tensor, "*rows dim"]


def three_pass(scores: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows keys"]:
    """The safe softmax of each row, in three passes over it.

    Args:
        scores: rows of finite scores, `(*rows, keys)`.

    Returns:
        The weights, which sum to one over the last axis, `(*rows, keys)`.

    Raises:
        ValueError: if a row is empty or a score is not finite.

    Source: Milakov & Gimelshein 2018, Algorithm 2.
    """
    _check_scores(scores)
    m = torch.full_like(scores[..., 0], NEVER)
    for score in scores.unbind(-1):
        m = torch.maximum(m, score)
    ell = torch.zeros_like(m)
    for score in scores.unbind(-1):
        ell = ell + torch.exp(score - m)
    return torch.stack([torch.exp(score - m) / ell for score in scores.unbind(-1)], dim=-1)


def online(scores: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows keys"]:
    """The safe softmax of each row, in two passes: maximum and denominator are found together.

    Args:
        scores: rows of finite scores, `(*rows, keys)`.

    Returns:
        The weights, which sum to one over the last axis, `(*rows, keys)`.

    Raises:
        ValueError: if a row is empty or a score is not finite.

    Source: Milakov & Gimelshein 2018, Algorithm 3.
    """
    _check_scores(scores)
    m = torch.full_like(scores[..., 0], NEVER)
    ell = torch.zeros_like(m)
    for score in scores.unbind(-1):
        m_new = torch.maximum(m, score)
        ell = ell * torch.exp(m - m_new) + torch.exp(score - m_new)
        m = m_new
    return torch.stack([torch.exp(score - m) / ell for score in scores.unbind(-1)], dim=-1)


def one_pass(
    scores: Float[Tensor, "*batch queries keys"], values: Float[Tensor, "*#batch keys dim"]
) -> Float[Tensor, "*batch queries dim"]:
    """softmax(scores) @ values in one pass over the keys, keeping only (m, ell, o).

    Args:
        scores: a row of finite scores for each query, `(*batch, queries, keys)`.
        values: the value of each key, `(*batch, keys, dim)`.

    Returns:
        The weighted mean of the values for each query, `(*batch, queries, dim)`.

    Raises:
        ValueError: if a row is empty or a score is not finite.

    Source: Rabe & Staats 2021, section 2; Dao et al. 2022, section 3.1.
    """
    _check_scores(scores)
    m = torch.full_like(scores[..., 0], NEVER)
    ell = torch.zeros_like(m)
    o = torch.zeros_like(scores[..., :1] * values[..., :1, :])
    for score, value in zip(scores.unbind(-1), values.unbind(-2), strict=True):
        m_new = torch.maximum(m, score)
        rescale, weight = torch.exp(m - m_new), torch.exp(score - m_new)
        ell = ell * rescale + weight
        o = o * rescale[..., None] + weight[..., None] * value[..., None, :]
        m = m_new
    return o / ell[..., None]


def identity_like(o: Float[Tensor, "*rows dim"]) -> SoftmaxState:
    """The state of no keys at all, (-inf, 0, 0), for rows shaped like `o`.

    Args:
        o: any tensor with the wanted shape, dtype and device, `(*rows, dim)`.

    Returns:
        The state that `merge` leaves every other state unchanged by.
    """
    return SoftmaxState(
        torch.full_like(o[..., 0], NEVER), torch.zeros_like(o[..., 0]), torch.zeros_like(o)
    )


def block_state(
    scores: Float[Tensor, "*batch queries keys"], values: Float[Tensor, "*#batch keys dim"]
) -> SoftmaxState:
    """The state of one block of keys, computed at once.

    Args:
        scores: `(*batch, queries, keys)`; a key that a query may not see has score -inf, and a row may have no
            other.
        values: the values of the block, `(*batch, keys, dim)`; the batch axes may broadcast.

    Returns:
        (m, ell, o); for a row without visible keys, and for an empty block, the identity.

    Source: Dao et al. 2022, section 3.1.
    """
    if scores.shape[-1] == 0:
        return identity_like(scores @ values)
    m = scores.amax(dim=-1)
    weights = torch.exp(scores - _finite(m)[..., None])
    return SoftmaxState(m, weights.sum(dim=-1), weights @ values)


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """The state of two sets of keys together.

    Args:
        a: the state of one set of keys.
        b: the state of another set, which shares no key with the first, for the same rows.

    Returns:
        The state of their union.

    Source: Dao et al. 2022, section 3.1; Milakov & Gimelshein 2018, section 3.1 (m and ell).
    """
    m = torch.maximum(a.m, b.m)
    weight_a, weight_b = torch.exp(a.m - _finite(m)), torch.exp(b.m - _finite(m))
    ell = a.ell * weight_a + b.ell * weight_b
    o = a.o * weight_a[..., None] + b.o * weight_b[..., None]
    return SoftmaxState(m, ell, o)


def finish(state: SoftmaxState) -> tuple[Float[Tensor, "*rows dim"], Float[Tensor, "*rows"]]:
    """Divide once, at the end: the output of attention and its log-sum-exp.

    Args:
        state: the state of all keys.

    Returns:
        The output `o / ell`, `(*rows, dim)`, and LSE = m + log(ell), `(*rows)`; for a row that saw no key,
        the output is 0 and LSE is -inf.

    Source: Dao 2023, section 3.1.
    """
    empty = state.ell == 0
    denominator = torch.where(empty, 1.0, state.ell)
    lse = torch.where(empty, NEVER, state.m + torch.log(denominator))
    return state.o / denominator[..., None], lse


def _check_scores(scores: Tensor) -> None:
    if scores.dim() == 0 or scores.shape[-1] == 0 or not scores.isfinite().all():
        raise ValueError(f"need finite scores, at least one a row, got shape {tuple(scores.shape)}")


def _finite(m: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """m with -inf replaced by 0: where no key has been seen, exp(-inf - m) shall be 0 and not exp(nan)."""
    return torch.where(m == NEVER, 0.0, m)
