"""DeepSeek-V3 assembled: the ground floor's decoder, with latent attention in all layers and mixtures in most.

model = decoder(tiny())
loss = next_token_loss(model(tokens), targets) + auxiliary_loss(model)     each step, and `balance(model)` after it
generate(model, prompt, 50)                                                with a cache of latents
model.load_state_dict(from_checkpoint(state, config))                      as released, or of transformers
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from noise2tokens.deepseek_v3.config import LATENT_EPS, Config
from noise2tokens.mla import attention as mla
from noise2tokens.moe import layer as moe
from noise2tokens.moe.balancing import Balancing
from noise2tokens.moe.experts import grouped
from noise2tokens.moe.layer import MixtureOfExperts
from noise2tokens.transformer import Decoder, SwiGLU


def decoder(
    config: Config,
    *,
    layers: int | None = None,
    dense: int | None = None,
    balancing: Balancing = Balancing(),  # noqa: B008 (it cannot be changed)
    compute: Callable[..., Tensor] = grouped,
    linear: Callable[..., nn.Module] = nn.Linear,
) -> Decoder:
    """Make the main model; `count_parameters` agrees with it, also under `torch.device("meta")`.

    Args:
        config: Sizes.
        layers, dense: In place of the config's, as for a module of multi-token prediction.
        balancing: What keeps the experts evenly loaded.
        compute: Of the routed experts, as for `MixtureOfExperts`.
        linear: Makes all linear maps of the layers but routers and routed experts.

    Source: DeepSeek-V3, 2024, section 2.1, figure 2.
    """
    layers = config.layers if layers is None else layers
    dense = config.dense if dense is None else dense
    mixture = partial(MixtureOfExperts, sizes=config.mixture, balancing=balancing, compute=compute)
    model = mla.latent_decoder(
        config.decoder(layers),
        config.attention,
        factor=config.yarn_factor,
        trained_length=config.trained_length,
        feed_forward=[SwiGLU] * dense + [mixture] * (layers - dense),
        linear=linear,
    )
    for module in model.modules():
        if isinstance(module, mla.LatentAttention):
            module.kv_norm.eps = LATENT_EPS
            if config.attention.query_rank is not None:
                module.query_norm.eps = LATENT_EPS
    return model


# Names: ours, and those of checkpoints.
OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
NORMS = {
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}
DENSE = {f"{name}.weight": f"{name}_proj.weight" for name in ("gate", "up", "down")}


def block_to_checkpoint(
    state: Mapping[str, Tensor], config: Config, *, separate: bool = False
) -> dict[str, Tensor]:
    """Rename one block's state, as in a checkpoint below `model.layers.i.`; arguments as for `to_checkpoint`."""
    renamed = {theirs: state[ours] for ours, theirs in NORMS.items()}
    attention = mla.to_transformers(below(state, "attention."), config.attention)
    renamed |= under("self_attn.", attention)
    inner = below(state, "feed_forward.")
    if "router" in inner:
        inner = moe.to_transformers(inner, separate=separate)
    else:
        inner = {DENSE[name]: weight for name, weight in inner.items()}
    return renamed | under("mlp.", inner)


def block_from_checkpoint(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Undo `block_to_checkpoint`, with experts together or separate."""
    renamed = {ours: take(state, theirs) for ours, theirs in NORMS.items()}
    attention = mla.from_transformers(below(state, "self_attn."), config.attention)
    renamed |= under("attention.", attention)
    inner = below(state, "mlp.")
    if "gate.weight" in inner:
        inner = moe.from_transformers(inner)
        need = {"router", "bias", "experts.gate", "experts.up", "experts.down"}
        need |= set(moe.SHARED) if config.mixture.shared else set()
        if set(inner) != need:
            raise ValueError(f"need {sorted(need)} of a mixture, got {sorted(inner)}")
    else:
        inner = {ours: take(inner, theirs) for ours, theirs in DENSE.items()}
    return renamed | under("feed_forward.", inner)


def to_checkpoint(
    state: Mapping[str, Tensor], config: Config, *, separate: bool = False
) -> dict[str, Tensor]:
    """Rename the state of a `decoder` for transformers' `DeepseekV3ForCausalLM`, or as it is released.

    Args:
        state: From `state_dict`.
        config: Sizes.
        separate: Three matrices for each expert, as in released checkpoints, in place of two tensors for all.
    """
    renamed = {theirs: state[ours] for ours, theirs in OUTER.items()}
    for i in range(config.layers):
        block = block_to_checkpoint(below(state, f"blocks.{i}."), config, separate=separate)
        renamed |= under(f"model.layers.{i}.", block)
    return renamed


def from_checkpoint(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Rename the state of a checkpoint for `decoder`; layers past `config.layers`, of prediction, are left out.

    Raises:
        ValueError: If names are missing, or there are names that it does not know.
    """
    renamed = {ours: take(state, theirs) for ours, theirs in OUTER.items()}
    for i in range(config.layers):
        block = block_from_checkpoint(below(state, f"model.layers.{i}."), config)
        renamed |= under(f"blocks.{i}.", block)
    later = tuple(f"model.layers.{config.layers + k}." for k in range(config.predictions))
    known = set(OUTER.values()) | {
        name for name in state if name.startswith(tuple(_layers(config)) + later)
    }
    if unknown := set(state) - known:
        raise ValueError(f"unknown names: {sorted(unknown)}")
    return renamed


def _layers(config: Config) -> list[str]:
    return [f"model.layers.{i}." for i in range(config.layers)]


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keep what is below a prefix, without it."""
    return {
        name.removeprefix(prefix): weight
        for name, weight in state.items()
        if name.startswith(prefix)
    }


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: weight for name, weight in state.items()}


def take(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"need {name}, got {sorted(state)[:20]}")
    return state[name]
