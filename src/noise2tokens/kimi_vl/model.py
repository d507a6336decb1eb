"""Kimi-VL: MoonViT, a projector, and chapter 15's decoder, which reads pictures as if they were text.

model = kimi_vl(tiny())
loss = next_token_loss(model(batch.tokens, batch.patches, batch.grids), batch.labels)    see batch.py
model.answer(("what is the number? ", preprocess(array, model.vision.config)), 8)
model.load_state_dict(from_checkpoint(state, config))                                    as released
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from noise2tokens.deepseek_v3 import config as v3
from noise2tokens.deepseek_v3 import count
from noise2tokens.deepseek_v3 import model as language_model
from noise2tokens.deepseek_v3.model import below, take, under
from noise2tokens.kimi_vl.batch import TEXT, pack_pictures, prompt_tokens
from noise2tokens.kimi_vl.moonvit import MOONVIT, Grid, MoonViT, VisionConfig, vision_parameters
from noise2tokens.kimi_vl.preprocess import Picture
from noise2tokens.kimi_vl.projector import Projector, projector_parameters
from noise2tokens.mla.rope import to_halves, to_interleaved
from noise2tokens.moe.layer import MoEConfig
from noise2tokens.transformer import Decoder, KVCache, generate


@dataclass(frozen=True)
class Config:
    """The sizes of all parts; ValueError if the image token is none of the vocabulary."""

    vision: VisionConfig
    language: v3.Config
    image_token: int  # stands where a picture's embeddings go

    def __post_init__(self):
        if not 0 <= self.image_token < self.language.vocab_size:
            size = self.language.vocab_size
            raise ValueError(f"need one of {size} tokens for pictures, got {self.image_token}")


# Source: config.json of moonshotai/Kimi-VL-A3B-Instruct. Moonlight, after its context was stretched to 128K.
A3B = Config(
    vision=MOONVIT,
    language=replace(v3.MOONLIGHT, rope_base=800_000, trained_length=131_072),
    image_token=163605,
)


def tiny(
    vision_width: int = 48,
    width: int = 64,
    vision_layers: int = 2,
    layers: int = 2,
    patch: int = 4,
    experts: int = 4,
) -> Config:
    """Return a config that learns to read on a CPU: bytes, one channel, and every part of the published one.

    Args:
        vision_width, vision_layers: Of the encoder; the width a multiple of 16.
        width, layers: Of the language model; the width a multiple of 32, and the first layer dense.
        patch: Pixels a side.
        experts: Of a mixture; two of them for each token, and a shared one.
    """
    vision = VisionConfig(
        vision_width, vision_layers, 4, 2 * vision_width, patch, table=8, channels=1
    )
    language = v3.tiny(TEXT.end + 2, 0, width, layers)
    mixture = MoEConfig(experts, 2, width, shared=1, scale=2.5)
    return Config(vision, replace(language, mixture=mixture), image_token=TEXT.end + 1)


class KimiVL(nn.Module):
    """Encoder, projector and language model in one.

    Args:
        vision: Sizes of the encoder.
        language: Any decoder of the ground floor's kind.
        image_token: The token in whose place embeddings of pictures go.

    Source: Kimi-VL technical report, 2025, section 2.1 and figure 3.
    """

    def __init__(self, vision: VisionConfig, language: Decoder, image_token: int):
        super().__init__()
        self.image_token = image_token
        self.vision = MoonViT(vision)
        self.projector = Projector(vision.width, vision.merge**2, language.config.width)
        self.language = language

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        patches: Float[Tensor, "_ P"] | None = None,
        grids: Sequence[Grid] = (),
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return logits of the next token.

        Args:
            tokens: Text, and image tokens where pictures stand; padded on the right, if at all.
            patches, grids: Of all pictures in the order of the tokens, as for `MoonViT`.
            cache: From `language.new_cache`: these tokens continue those that it holds.
        """
        return self.language.logits(
            self.language.hidden(self.embed(tokens, patches, grids), cache=cache)
        )

    def embed(
        self,
        tokens: Int[Tensor, "B T"],
        patches: Float[Tensor, "_ P"] | None = None,
        grids: Sequence[Grid] = (),
    ) -> Float[Tensor, "B T D"]:
        """Return embeddings: of text from the table, of pictures from the encoder, in their order.

        Raises:
            ValueError: If the pictures make more or fewer embeddings than there are image tokens, or as `MoonViT`.
        """
        x_BTD = self.language.embedding(tokens)
        places_BT = tokens == self.image_token
        if (patches is None) != (len(grids) == 0):
            raise ValueError(f"patches and grids come together, got grids {list(grids)}")
        if patches is None:
            vectors_MD = x_BTD.new_empty(0, x_BTD.shape[-1])
        else:
            vectors_MD = self.projector(self.vision(patches, grids))
        if places_BT.sum() != len(vectors_MD):
            got = f"{len(vectors_MD)} embeddings for {int(places_BT.sum())} image tokens"
            raise ValueError(f"each image token takes one embedding, got {got}")
        return x_BTD.masked_scatter(places_BT[..., None], vectors_MD.to(x_BTD.dtype))

    @torch.no_grad()
    def generate(
        self,
        prompt: Int[Tensor, "B T"],
        n: int,
        patches: Float[Tensor, "_ P"] | None = None,
        grids: Sequence[Grid] = (),
        **options: Any,
    ) -> Int[Tensor, "B _"]:
        """Continue prompts of equal length by the ground floor's `generate`, with a cache; its options."""
        embeddings = self.embed(prompt, patches, grids)
        return generate(self.language, prompt, n, embeddings=embeddings, **options)

    def answer(self, prompt: Sequence[str | Picture], n: int, **options: Any) -> str:
        """Return the text, of at most n bytes, with which the model goes on after a prompt of texts and pictures."""
        return self.answers([prompt], n, **options)[0]

    def answers(
        self, prompts: Sequence[Sequence[str | Picture]], n: int, **options: Any
    ) -> list[str]:
        """Answer many prompts, those of equal length at once; arguments as for `answer`."""
        device = self.language.embedding.weight.device
        merge = self.vision.config.merge
        rows = [prompt_tokens(prompt, self.image_token, merge) for prompt in prompts]
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        texts = [""] * len(rows)
        for length, members in by_length.items():
            pictures = [p for i in members for p in prompts[i] if isinstance(p, Picture)]
            patches, grids = pack_pictures(pictures)
            patches = None if patches is None else patches.to(device)
            row = torch.stack([rows[i] for i in members]).to(device)
            out = self.generate(row, n, patches, grids, stop=TEXT.end, **options)
            for i, new in zip(members, out[:, length:].tolist(), strict=True):
                texts[i] = bytes(t for t in new if t < TEXT.end).decode(errors="replace")
        return texts


def kimi_vl(config: Config, **parts: Any) -> KimiVL:
    """Make the model, with chapter 15's decoder as its language model; `parts` as for that."""
    language = language_model.decoder(config.language, **parts)
    return KimiVL(config.vision, language, config.image_token)


def count_parameters(config: Config, *, active: bool = False) -> dict[str, int]:
    """Count parameters: "vision", "projector", and the parts of the language model as chapter 15 names them.

    Args:
        config: Sizes.
        active: Count of the routed experts only those that one token goes to.
    """
    vision, language = config.vision, config.language
    parts = {
        "vision": sum(vision_parameters(vision).values()),
        "projector": projector_parameters(vision.width, vision.merge**2, language.width),
    }
    return parts | count.count_parameters(language, active=active)


def conventions(config: Config) -> dict[str, dict[str, int]]:
    """Count all and active parameters in each of the ways that published numbers may be meant.

    Returns:
        "all" and "active" of: "layers" of the language model, without embedding and head; "layers and head"; "language
        model", with both; "all parts", with encoder and projector too.
    """
    ways = {
        "layers": ("vision", "projector", "embedding", "head"),
        "layers and head": ("vision", "projector", "embedding"),
        "language model": ("vision", "projector"),
        "all parts": (),
    }
    counted = {"all": count_parameters(config), "active": count_parameters(config, active=True)}
    return {
        way: {
            kind: sum(number for name, number in parts.items() if name not in without)
            for kind, parts in counted.items()
        }
        for way, without in ways.items()
    }


# Names: ours, and those of the released checkpoint.
VISION_OUTER = {
    "embedding.weight": "patch_embed.proj.weight",
    "embedding.bias": "patch_embed.proj.bias",
    "table": "patch_embed.pos_emb.weight",
    "norm.weight": "encoder.final_layernorm.weight",
    "norm.bias": "encoder.final_layernorm.bias",
}
VISION_BLOCK = {
    "attention_norm": "norm0",
    "attention.qkv": "wqkv",
    "attention.out": "wo",
    "feed_forward_norm": "norm1",
    "up": "mlp.fc0",
    "down": "mlp.fc1",
}
PROJECTOR = {"norm": "pre_norm", "inner": "linear_1", "out": "linear_2"}
PREFIXES = {
    "vision": "vision_tower.",
    "projector": "multi_modal_projector.",
    "language": "language_model.",
}


def vision_names(layers: int) -> dict[str, str]:
    """Map our names of the encoder to those below `vision_tower.`."""
    names = dict(VISION_OUTER)
    for i in range(layers):
        for ours, theirs in VISION_BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{i}.{ours}.{kind}"] = f"encoder.blocks.{i}.{theirs}.{kind}"
    return names


def projector_names() -> dict[str, str]:
    """Map our names of the projector to those below `multi_modal_projector.`."""
    kinds = ("weight", "bias")
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in PROJECTOR.items() for kind in kinds}


def to_checkpoint(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Rename the state of `kimi_vl(config)` as it is released: pairs interleaved, each expert by itself.

    Raises:
        ValueError: If names are missing.
    """
    vision, size = below(state, "vision."), config.vision
    made = {theirs: take(vision, ours) for ours, theirs in vision_names(size.layers).items()}
    kernel = VISION_OUTER["embedding.weight"]
    made[kernel] = made[kernel].unflatten(1, (size.channels, size.patch, size.patch))
    made = _qkv(made, size, to_interleaved)
    inner = below(state, "projector.")
    projected = {theirs: take(inner, ours) for ours, theirs in projector_names().items()}
    text = language_model.to_checkpoint(below(state, "language."), config.language, separate=True)
    return {
        **under(PREFIXES["vision"], made),
        **under(PREFIXES["projector"], projected),
        **under(PREFIXES["language"], text),
    }


def from_checkpoint(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Undo `to_checkpoint`: rename the state of a released checkpoint for `kimi_vl(config)`.

    Raises:
        ValueError: If names are missing, or there are names that it does not know.
    """
    names = vision_names(config.vision.layers)
    theirs = {part: below(state, prefix) for part, prefix in PREFIXES.items()}
    known = {PREFIXES["vision"] + name for name in names.values()}
    known |= {PREFIXES["projector"] + name for name in projector_names().values()}
    language = {name for name in state if name.startswith(PREFIXES["language"])}
    if unknown := set(state) - known - language:
        raise ValueError(f"unknown names: {sorted(unknown)[:20]}")
    vision = _qkv(theirs["vision"], config.vision, to_halves)
    made = {ours: take(vision, name) for ours, name in names.items()}
    made["embedding.weight"] = made["embedding.weight"].flatten(1)
    projected = {ours: take(theirs["projector"], name) for ours, name in projector_names().items()}
    text = language_model.from_checkpoint(theirs["language"], config.language)
    return {
        **under("vision.", made),
        **under("projector.", projected),
        **under("language.", text),
    }


def _qkv(state: Mapping[str, Tensor], config: VisionConfig, order) -> dict[str, Tensor]:
    """Reorder the coordinates of all heads' queries and keys in released matrices and biases; values stay."""

    def reordered(weight: Shaped[Tensor, "rows *rest"]) -> Tensor:
        parts = weight.unflatten(0, (3, config.heads, config.head_dim)).movedim(2, -1)
        parts = torch.cat([order(parts[:2]), parts[2:]])
        return parts.movedim(-1, 2).flatten(0, 2)

    return {name: reordered(w) if ".wqkv." in name else w for name, w in state.items()}
