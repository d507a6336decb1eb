"""What DeepSeek-V3 holds and computes, term by term, from its sizes alone.

Letters: D width, H heads; N, R, V, C the sizes of latent attention (`mla.attention.Sizes`), Q of the queries' latent.
"""

from noise2tokens.deepseek_v3.config import Config
from noise2tokens.mla.attention import Sizes


def attention_parameters(width: int, heads: int, sizes: Sizes) -> int:
    """Count the matrices of one layer's latent attention; the norms of its latents are counted with the norms.

    Down to the latent and the rotary key, D (C + R); up to keys and values, C H (N + V); out, H V D; queries,
    D Q + Q H (N + R), or D H (N + R) without a latent.
    """
    query = heads * (sizes.nope_dim + sizes.rope_dim)
    rank = sizes.query_rank
    return (
        width * (sizes.kv_rank + sizes.rope_dim)
        + sizes.kv_rank * heads * (sizes.nope_dim + sizes.value_dim)
        + heads * sizes.value_dim * width
        + (width * query if rank is None else width * rank + rank * query)
    )


def layer_norms(config: Config) -> int:
    """Count one layer's norms: before attention, before the feed-forward network, and of the latents."""
    return 2 * config.width + config.attention.kv_rank + (config.attention.query_rank or 0)


def mixture_parameters(config: Config, *, active: bool = False) -> dict[str, int]:
    """Count one mixture's experts and router: all of them, or those that a token is multiplied with."""
    sizes = config.mixture
    expert = 3 * config.width * sizes.hidden
    return {
        "routed experts": (sizes.top_k if active else sizes.experts) * expert,
        "shared experts": sizes.shared * expert,
        "routers": sizes.experts * config.width,
    }


def count_parameters(config: Config, *, active: bool = False) -> dict[str, int]:
    """Count the parameters of the main model by component; the biases for balancing are not learned, and left out.

    Args:
        config: Sizes.
        active: Count of the routed experts only those that one token goes to. The whole embedding is counted either
            way, of which a token reads one row; leave that component out of the sum where it should not count.

    Returns:
        "embedding", "attention", "dense layers", "routed experts", "shared experts", "routers", "norms", "head".
    """
    mixtures = config.layers - config.dense
    parts = {
        "embedding": config.vocab_size * config.width,
        "attention": config.layers
        * attention_parameters(config.width, config.heads, config.attention),
        "dense layers": config.dense * 3 * config.width * config.hidden,
    }
    for name, number in mixture_parameters(config, active=active).items():
        parts[name] = mixtures * number
    parts["norms"] = config.layers * layer_norms(config) + config.width
    parts["head"] = config.vocab_size * config.width
    return parts


def prediction_parameters(config: Config, *, active: bool = False) -> dict[str, int]:
    """Count one module of multi-token prediction without the embedding and the head, which are the main model's.

    Returns:
        "projection" from two streams to one; "block", with its norms; "norms", of the two streams and of the output.
    """
    block = attention_parameters(config.width, config.heads, config.attention)
    block += layer_norms(config) + sum(mixture_parameters(config, active=active).values())
    return {"projection": 2 * config.width**2, "block": block, "norms": 3 * config.width}


def routing_biases(config: Config) -> int:
    """Count the biases of the main model's routers, which checkpoints hold beside the parameters."""
    return (config.layers - config.dense) * config.mixture.experts


def checkpoint_numbers(config: Config) -> int:
    """Count what a released checkpoint holds: modules of prediction have biases, embedding and head of their own."""
    module = sum(prediction_parameters(config).values()) + config.mixture.experts
    module += 2 * config.vocab_size * config.width
    main = sum(count_parameters(config).values()) + routing_biases(config)
    return main + config.predictions * module


def pair_multiplications(config: Config) -> int:
    """Count what one layer multiplies for a token and one that it reads: H (N + R) for the score, H V for the value."""
    sizes = config.attention
    return config.heads * (sizes.nope_dim + sizes.rope_dim + sizes.value_dim)


def training_flops(config: Config, length: int, *, causal: bool = False) -> float | int:
    """Count the operations of a training step for each token: 2 for a multiplication, three passes; the main model.

    Args:
        config: Sizes.
        length: Tokens of a sequence.
        causal: Let a token meet (length + 1) / 2 tokens on average, and not all, as papers count.

    Raises:
        ValueError: If the length is not positive.
    """
    parts = count_parameters(config, active=True)
    matrices = sum(n for name, n in parts.items() if name not in ("embedding", "norms"))
    keys = _keys(length, causal)
    return 6 * (matrices + config.layers * pair_multiplications(config) * keys)


def prediction_flops(config: Config, length: int, *, causal: bool = False) -> float | int:
    """Count likewise what one module of multi-token prediction adds: its projection, its block, the head once more."""
    parts = prediction_parameters(config, active=True)
    matrices = parts["projection"] + parts["block"] - layer_norms(config)
    matrices += config.vocab_size * config.width
    return 6 * (matrices + pair_multiplications(config) * _keys(length, causal))


def _keys(length: int, causal: bool) -> float | int:
    if length < 1:
        raise ValueError(f"need length >= 1, got {length}")
    return (length + 1) / 2 if causal else length


def eight_bit_matrices(config: Config) -> list[tuple[int, int, int]]:
    """List (rows, columns, how many) of the matrices that the released files hold in FP8, those of prediction included.

    They are the maps of attention, dense layers and experts; routers, embedding, head, norms and the projection of
    multi-token prediction are in bfloat16.
    """
    sizes, heads, width = config.attention, config.heads, config.width
    query = heads * (sizes.nope_dim + sizes.rope_dim)
    layers = config.layers + config.predictions
    experts = (layers - config.dense) * (config.mixture.experts + config.mixture.shared)
    queries = [(query, width)]
    if sizes.query_rank is not None:
        queries = [(sizes.query_rank, width), (query, sizes.query_rank)]
    attention = [
        *queries,
        (sizes.kv_rank + sizes.rope_dim, width),
        (heads * (sizes.nope_dim + sizes.value_dim), sizes.kv_rank),
        (width, heads * sizes.value_dim),
    ]
    return [
        *((rows, columns, layers) for rows, columns in attention),
        (config.hidden, width, 3 * config.dense),
        (config.mixture.hidden, width, 3 * experts),
    ]


def stored_numbers(config: Config) -> dict[str, int]:
    """Count what released files hold in each type: a scale comes with each block of 128×128 of an FP8 matrix.

    Shared experts are counted one by one, which is the same where their width is a multiple of 128.

    Returns:
        "BF16", "F8_E4M3", and "F32", which are scales and biases of routers.
    """
    matrices = eight_bit_matrices(config)
    eight = sum(rows * columns * count for rows, columns, count in matrices)
    scales = sum(-(-rows // 128) * -(-columns // 128) * count for rows, columns, count in matrices)
    biases = (config.layers + config.predictions - config.dense) * config.mixture.experts
    rest = checkpoint_numbers(config) - eight - biases
    return {"BF16": rest, "F8_E4M3": eight, "F32": scales + biases}
