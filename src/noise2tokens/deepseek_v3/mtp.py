"""Multi-token prediction: small modules behind the main model that learn, and then draft, the tokens after the next.

model = MultiToken(tiny(predictions=2))
main, depths = model.losses(inputs, targets)
loss = main + prediction_loss(depths, weight=0.3) + auxiliary_loss(model)      each step, and `balance(model)` after it
generate(model.main, prompt, 50)                                               without the modules, one token a step
tokens, accepted = speculate(model, prompt, 50)                                the same tokens in fewer steps

Counting tokens from 1 as the paper does, the main model's h⁰_i has read t_1 to t_i and predicts t_{i+1}. The module at
depth k makes h^k_i from h^{k-1}_i and the embedding of t_{i+k}, and predicts t_{i+k+1}. So no depth sees what it is to
predict, and each one is one token shorter than the one before it.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.deepseek_v3.config import Config
from noise2tokens.deepseek_v3.model import (
    below,
    block_from_checkpoint,
    block_to_checkpoint,
    decoder,
    from_checkpoint,
    take,
    to_checkpoint,
    under,
)
from noise2tokens.transformer import INITIAL_STD, Decoder, KVCache, next_token_loss


class Prediction(nn.Module):
    """One depth: a projection of two streams to one, and a block; embedding and head are the main model's.

    The block stands in a decoder of one layer, whose last norm is this depth's own.

    Args:
        config: Sizes.
        main: What it shares embedding and head with.
        options: As for `decoder`.

    Source: DeepSeek-V3, 2024, section 2.2, equations 21 to 23, figure 3.
    """

    def __init__(self, config: Config, main: Decoder, **options):
        super().__init__()
        self.hidden_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.embedding_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.projection = nn.Linear(2 * config.width, config.width, bias=False)
        nn.init.normal_(self.projection.weight, std=INITIAL_STD)
        self.decoder = decoder(config, layers=1, dense=0, **options)
        self.decoder.embedding, self.decoder.head = main.embedding, main.head

    def forward(
        self,
        h_BTD: Float[Tensor, "B T D"],
        tokens_BT: Int[Tensor, "B T"],
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return this depth's stream from that of the depth before and the tokens that each of it is shown."""
        embedded_BTD = self.embedding_norm(self.decoder.embedding(tokens_BT))
        joined_BTE = torch.cat([self.hidden_norm(h_BTD), embedded_BTD], -1)  # equation 21
        return self.decoder.hidden(self.projection(joined_BTE), cache=cache)  # equation 22

    def logits(self, h_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Return the shared head's reading of this depth's normalized stream (equation 23)."""
        return self.decoder.logits(h_BTD)


class MultiToken(nn.Module):
    """The main model, and the modules behind it.

    Args:
        config: Sizes; `predictions` modules.
        options: As for `decoder`.
    """

    def __init__(self, config: Config, **options):
        super().__init__()
        self.config = config
        self.main = decoder(config, **options)
        self.depths = nn.ModuleList(
            Prediction(config, self.main, **options) for _ in range(config.predictions)
        )

    def streams(self, inputs: Int[Tensor, "B T"]) -> list[Float[Tensor, "B _ D"]]:
        """Return h⁰, h¹ and so on, each before its norm and one token shorter than the one before."""
        h = [self.main.hidden(self.main.embedding(inputs))]
        for k, module in enumerate(self.depths, 1):
            h.append(module(h[-1][:, :-1], inputs[:, k:]))
        return h

    def logits(self, inputs: Int[Tensor, "B T"]) -> list[Float[Tensor, "B _ V"]]:
        """Return logits of t_{i+1} from the main model, of t_{i+2} from the first module, and so on.

        Raises:
            ValueError: If a depth would have no token left.
        """
        if inputs.shape[1] <= len(self.depths):
            raise ValueError(f"{len(self.depths)} depths need more tokens, got {inputs.shape[1]}")
        heads = [self.main, *self.depths]
        return [head.logits(h) for head, h in zip(heads, self.streams(inputs), strict=True)]

    def losses(
        self, inputs: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, ""], list[Float[Tensor, ""]]]:
        """Return the main model's loss, and that of each depth, in nats.

        All are divided by the number of the main model's targets, T, although depth k has k fewer: a sum over fewer
        tokens counts for less. Targets of -100 count nowhere.

        Args:
            inputs: t_1 to t_T.
            targets: The token that follows each, t_2 to t_{T+1}.

        Source: DeepSeek-V3, 2024, equation 24.
        """
        main, *depths = self.logits(inputs)
        whole, scaled = (targets != -100).sum(), []
        for k, logits in enumerate(depths, 1):
            exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
            scaled.append(F.cross_entropy(exact.mT, targets[:, k:], reduction="sum") / whole)
        return next_token_loss(main, targets), scaled


def prediction_loss(
    depths: Sequence[Float[Tensor, ""]], weight: float | int
) -> Float[Tensor, ""] | float:
    """Return λ / D times the sum of the depths' losses; 0 if there are none.

    DeepSeek-V3 has λ = 0.3 for the first 10T tokens and 0.1 after (section 4.2).

    Source: DeepSeek-V3, 2024, equation 25.
    """
    if not weight >= 0:
        raise ValueError(f"need weight >= 0, got {weight}")
    return weight * sum(depths) / len(depths) if depths else 0.0


@torch.no_grad()
def agreement(model: MultiToken, inputs: Int[Tensor, "B T"]) -> list[Bool[Tensor, "B _"]]:
    """Say for each depth where its likeliest token is the one that the main model finds likeliest one step later.

    All see the text itself. Depth k at token i and the main model at token i + k predict t_{i+k+1}: a draft from text
    would be accepted there.
    """
    main, *depths = (logits.argmax(-1) for logits in model.logits(inputs))
    return [guess == main[:, k:] for k, guess in enumerate(depths, 1)]


class Drafter:
    """What the modules remember of a text, and the tokens that they propose.

    Depth k at token i has used t_{i+k}, which may have been a draft itself. Where that draft is rejected, what the
    depth remembers from there on is wrong, though the main model's own memory of token i is right.

    Attributes:
        caches: For each depth.
        streams: h⁰ for all tokens that the main model has read, and h^k for those in the cache of depth k.
    """

    def __init__(self, model: MultiToken, h_1TD: Float[Tensor, "1 T D"]):
        self.model = model
        self.caches = [module.decoder.new_cache() for module in model.depths]
        self.streams = [h_1TD] + [h_1TD[:, :0]] * len(model.depths)

    def draft(self, text_1T: Int[Tensor, "1 T"]) -> Int[Tensor, "1 _"]:
        """Propose a token for each depth after a text, all but whose last token the main model has read."""
        count = text_1T.shape[1]
        for k, (module, cache) in enumerate(zip(self.model.depths, self.caches, strict=True), 1):
            past = cache[0].length
            h = module(self.streams[k - 1][:, past : count - 1], text_1T[:, past + k :], cache)
            self.streams[k] = torch.cat([self.streams[k], h], 1)
            proposed = module.logits(h[:, -1]).argmax(-1, keepdim=True)
            text_1T = torch.cat([text_1T, proposed], 1)
        return text_1T[:, count:]

    def settle(self, known: int, h_1TD: Float[Tensor, "1 _ D"]) -> None:
        """Take the main model's stream of tokens that it has read since, and forget what rejected drafts have left.

        Args:
            known: Tokens of the text up to the last accepted draft: depth k keeps its first known - k, if it has them.
            h_1TD: h⁰ of the new ones.
        """
        self.streams[0] = torch.cat([self.streams[0], h_1TD], 1)
        for k, cache in enumerate(self.caches, 1):
            keep = max(0, min(cache[0].length, known - k))
            cache[0].crop(keep)
            self.streams[k] = self.streams[k][:, :keep]


@torch.no_grad()
def speculate(
    model: MultiToken, prompt: Int[Tensor, "B T"], n: int
) -> tuple[Int[Tensor, "1 _"], list[int]]:
    """Continue a prompt as `generate(model.main, prompt, n)` does, reading several drafted tokens in one step.

    A step of the main model reads the newest token and the drafts after it. It gives the token that belongs after each
    of them; drafts are accepted as long as they are these tokens, and the first that is not is replaced. So every step
    gives between 1 and D + 1 tokens, all of them the main model's own.

    Args:
        model: In `eval` mode.
        prompt: One text.
        n: Tokens to add.

    Returns:
        The prompt and n tokens after it; and for each step how many of its D drafts were accepted.

    Raises:
        ValueError: If n is below 1, there is more than one prompt, or it is empty.

    Source: Leviathan et al., 2023, algorithm 1, at temperature 0; DeepSeek-V3, 2024, sections 2.2 and 5.4.3.
    """
    if n < 1 or len(prompt) != 1 or not prompt.shape[1]:
        got = f"{n} and {tuple(prompt.shape)}"
        raise ValueError(f"need n >= 1 and one prompt that is not empty, got {got}")
    main, cache = model.main, model.main.new_cache(prompt.shape[1] + n + len(model.depths))
    h = main.hidden(main.embedding(prompt), cache=cache)
    text = torch.cat([prompt, main.logits(h[:, -1:]).argmax(-1)], 1)
    drafter, accepted = Drafter(model, h), []
    while (count := text.shape[1]) < prompt.shape[1] + n:
        drafts = drafter.draft(text)
        h = main.hidden(main.embedding(torch.cat([text[:, -1:], drafts], 1)), cache=cache)
        own = main.logits(h).argmax(-1)  # what belongs after the newest token, and after each draft
        agreed = int((own[0, :-1] == drafts[0]).cumprod(0).sum())
        text = torch.cat([text, own[:, : agreed + 1]], 1)
        for layer in cache:
            layer.crop(count + agreed)
        drafter.settle(count + agreed, h[:, : agreed + 1])
        accepted.append(agreed)
    return text[:, : prompt.shape[1] + n], accepted


def expected_tokens(acceptance: Sequence[float | int]) -> float | int:
    """Return the mean number of tokens a step: 1, and for each depth the chance that all drafts up to it are accepted.

    Args:
        acceptance: For each depth, how often its draft is accepted where those before it are.

    Raises:
        ValueError: If one is no share.

    Source: Leviathan et al., 2023, equation 1, where all are equal: (1 - a^(D+1)) / (1 - a).
    """
    if not all(0 <= share <= 1 for share in acceptance):
        raise ValueError(f"need shares between 0 and 1, got {list(acceptance)}")
    return 1 + sum(accumulate(acceptance, mul))


# Names below `model.layers.i.` in a checkpoint: ours, and theirs.
NORMS = {
    "hidden_norm.weight": "hnorm.weight",
    "embedding_norm.weight": "enorm.weight",
    "decoder.norm.weight": "shared_head.norm.weight",
}
SHARED = {
    "decoder.embedding.weight": "embed_tokens.weight",
    "decoder.head.weight": "shared_head.head.weight",
}


def model_to_checkpoint(
    state: dict[str, Tensor], config: Config, *, separate: bool = True
) -> dict[str, Tensor]:
    """Rename the state of a `MultiToken` as it is released: module k is the layer after the main model's.

    Released modules join their streams the other way round than equation 21, the embedding first, so the halves of the
    projection change places; and they hold embedding and head once more.

    Source: README_WEIGHTS.md of deepseek-ai/DeepSeek-V3.
    """
    renamed = to_checkpoint(below(state, "main."), config, separate=separate)
    for k in range(config.predictions):
        inner = below(state, f"depths.{k}.")
        block = block_to_checkpoint(below(inner, "decoder.blocks.0."), config, separate=separate)
        block |= {theirs: inner[ours] for ours, theirs in (NORMS | SHARED).items()}
        block["eh_proj.weight"] = _swapped(inner["projection.weight"])
        renamed |= under(f"model.layers.{config.layers + k}.", block)
    return renamed


def model_from_checkpoint(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Undo `model_to_checkpoint`; embedding and head are taken from the main model.

    Raises:
        ValueError: If names are missing, or there are names that it does not know.
    """
    main = from_checkpoint(state, config)
    renamed = under("main.", main)
    for k in range(config.predictions):
        inner = below(state, f"model.layers.{config.layers + k}.")
        block = block_from_checkpoint(inner, config)
        ours = under("decoder.blocks.0.", block)
        ours |= {name: take(inner, theirs) for name, theirs in NORMS.items()}
        ours |= {name: main[name.removeprefix("decoder.")] for name in SHARED}
        ours["projection.weight"] = _swapped(take(inner, "eh_proj.weight"))
        renamed |= under(f"depths.{k}.", ours)
    return renamed


def _swapped(weight: Float[Tensor, "D E"]) -> Float[Tensor, "D E"]:
    return torch.cat(weight.chunk(2, 1)[::-1], 1)
