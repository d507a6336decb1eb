"""Let a Hugging Face causal language model leave padding out: tokens in, end to end; the same outputs, padded again.

The model stays the caller's. For a while its forward takes real tokens out of the padded batch, lays them into one
row with positions that restart, and lets attention see each sequence by itself. So every layer, the projections and the
head included, computes real tokens only. `transformers` is imported when the patch is put on, and not before.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from noise2tokens.sequence_packing.layout import IGNORED, pad, unpad, varlen_attention
from noise2tokens.transformer import next_token_loss

NAME = "each_sequence_by_itself"
# What attentions of transformers may be handed and ours does not compute: a window, capped scores, sinks.
BEYOND = ("sliding_window", "softcap", "s_aux")


def _attention(module, query, key, value, attention_mask, scaling=None, **options):
    """`varlen_attention` as transformers calls it; returns (batch, tokens, heads, dim) and no weights."""
    asked = [name for name in BEYOND if options.get(name) is not None]
    asked += ["dropout"] if options.get("dropout") else []
    if asked:
        raise NotImplementedError(f"{type(module).__name__} asks for {asked}: not computed here")
    if "cu_seqlens" not in options:
        raise TypeError(f"{type(module).__name__} got no cu_seqlens: its model keeps options back")
    cu, longest = options["cu_seqlens"], options["max_seqlen"]
    out = varlen_attention(query[0], key[0], value[0], cu, longest, scaling)
    return out.transpose(0, 1)[None], None


@contextmanager
def without_padding(model: nn.Module) -> Iterator[nn.Module]:
    """Let a model compute no padding for a while; afterwards it is as it was.

    Args:
        model: A causal language model of transformers whose attention goes through its attention interface: Llama,
            Qwen2, Qwen3 and many more.

    Within, `model(input_ids, attention_mask, labels=None)` returns an output with `logits` of the padded shape, 0 where
    padding was, and with labels the mean loss over all labels that are not -100.

    Raises:
        ImportError: If transformers is not there.
        TypeError: If the model has no attention that can be exchanged, or takes no `position_ids`, without which its
            positions cannot restart. Within: if it is called with a cache, or hands its attention no offsets.
        NotImplementedError: Within, if its attention asks for a sliding window, dropout, capped scores or sinks, which
            `varlen_attention` does not compute.
        ValueError: Within, if input and mask do not fit together, or no token is real.
    """
    try:
        from transformers import AttentionInterface
        from transformers.modeling_outputs import CausalLMOutput
    except ImportError as error:
        raise ImportError("without_padding needs transformers: pip install transformers") from error
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before is None or not hasattr(model, "lm_head"):
        raise TypeError(f"need a causal language model of transformers, got {type(model).__name__}")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise TypeError(
            f"{type(model).__name__} takes no position_ids, so that positions cannot restart in a row"
        )
    AttentionInterface.register(NAME, _attention)
    forward = model.forward

    def unpadded(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        **options: Any,
    ):
        if use_cache or past_key_values is not None:
            raise TypeError("packed rows have no cache: leave the patch for generation")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape or input_ids.dim() != 2:
            got = f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            raise ValueError(
                f"need input_ids and a mask of the same shape (batch, length), got {got}"
            )
        tokens, places, cu, longest = unpad(input_ids, attention_mask.bool())
        positions = torch.cat([torch.arange(n, device=cu.device) for n in cu.diff().tolist()])
        logits = forward(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            cu_seqlens=cu,
            max_seqlen=longest,
            **options,
        ).logits[0]
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, following(labels, attention_mask.bool())[places])
        return CausalLMOutput(loss=loss, logits=pad(logits, places, *input_ids.shape))

    config._attn_implementation = NAME
    model.forward = MethodType(unpadded, model)
    try:
        yield model
    finally:
        config._attn_implementation = before
        del model.forward


def following(labels: Tensor, mask: Tensor) -> Tensor:
    """For each place of a padded batch, flattened, the label that its token has to predict.

    The label of the next place, if that is a real token; else -100. So nothing is predicted across an end, whichever
    side the padding is on.
    """
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = torch.where(mask[:, 1:], labels[:, 1:], IGNORED)
    return following.flatten()
