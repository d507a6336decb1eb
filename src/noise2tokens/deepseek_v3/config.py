"""The sizes of DeepSeek-V3 and of its relatives, as published."""

from dataclasses import dataclass

from noise2tokens import transformer
from noise2tokens.mla.attention import V3 as V3_ATTENTION
from noise2tokens.mla.attention import Sizes
from noise2tokens.moe.layer import MoEConfig

LATENT_EPS = 1e-6  # in the norms of latents, whatever `norm_eps` is: a default in the released code


@dataclass(frozen=True)
class Config:
    """The sizes of a decoder with latent attention and mixtures of experts; ValueError if they do not fit together."""

    vocab_size: int
    width: int
    layers: int  # of the main model, without multi-token prediction
    heads: int
    hidden: int  # of a dense layer's feed-forward network
    attention: Sizes
    mixture: MoEConfig
    dense: int = 1  # layers with a dense network, the first ones
    predictions: int = 0  # modules of multi-token prediction, D
    rope_base: float | int = 10_000
    norm_eps: float | int = 1e-6
    yarn_factor: float | int = (
        1  # by how much YaRN stretches the context; 1 for plain rotary positions
    )
    trained_length: int = 4096  # tokens of the context before

    def __post_init__(self):
        if not 0 <= self.dense <= self.layers:
            raise ValueError(f"dense must be 0 to {self.layers}, the layers; got {self.dense}")
        if self.predictions < 0:
            raise ValueError(f"need predictions >= 0, got {self.predictions}")
        if not self.yarn_factor >= 1 or self.trained_length < 1:
            got = f"{self.yarn_factor} and {self.trained_length}"
            raise ValueError(f"need yarn_factor >= 1 and trained_length >= 1, got {got}")
        self.decoder()  # which checks the rest

    def decoder(self, layers: int | None = None) -> transformer.Config:
        """Return what the ground floor's decoder wants to know, for another number of layers if given."""
        return transformer.Config(
            self.vocab_size,
            self.width,
            self.layers if layers is None else layers,
            self.heads,
            hidden=self.hidden,
            rope_base=float(self.rope_base),
            norm_eps=float(self.norm_eps),
        )


# Source: config.json of deepseek-ai/DeepSeek-V3; DeepSeek-V3, 2024, section 4.2.
V3 = Config(
    vocab_size=129280,
    width=7168,
    layers=61,
    heads=128,
    hidden=18432,
    attention=V3_ATTENTION,
    mixture=MoEConfig(256, 8, 2048, shared=1, groups=8, top_groups=4, scale=2.5),
    dense=3,
    predictions=1,
    yarn_factor=40,
)
# Source: config.json of deepseek-ai/DeepSeek-V2; DeepSeek-V2, 2024, section 3.1.2. Its affinities are a softmax, and
# its weights do not add up to `scale`: a count holds, a checkpoint would not compute the same here.
V2 = Config(
    vocab_size=102400,
    width=5120,
    layers=60,
    heads=128,
    hidden=12288,
    attention=V3_ATTENTION,
    mixture=MoEConfig(160, 6, 1536, shared=2, groups=8, top_groups=3, scale=16.0),
    yarn_factor=40,
)
# Source: config.json of moonshotai/Moonlight-16B-A3B; Liu et al., Muon is scalable for LLM training, 2025.
MOONLIGHT = Config(
    vocab_size=163840,
    width=2048,
    layers=27,
    heads=16,
    hidden=11264,
    attention=Sizes(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
    mixture=MoEConfig(64, 6, 1408, shared=2, scale=2.446),
    rope_base=50_000,
    norm_eps=1e-5,
    trained_length=8192,
)


def tiny(vocab_size: int = 257, predictions: int = 1, width: int = 64, layers: int = 3) -> Config:
    """Return a config of V3's kind that trains on a CPU: every part is there, and in about its proportions.

    Args:
        vocab_size: Tokens.
        predictions: Modules of multi-token prediction.
        width: A multiple of 32.
        layers: The first of them dense.
    """
    if width < 32 or width % 32:
        raise ValueError(f"need a multiple of 32 as width, got {width}")
    return Config(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=4,
        hidden=5 * width // 2,
        attention=Sizes(width // 2, width // 4, width // 8, width // 4, query_rank=3 * width // 4),
        mixture=MoEConfig(16, 4, width // 2, shared=1, groups=4, top_groups=2, scale=2.5),
        predictions=predictions,
        rope_base=10_000,
    )
