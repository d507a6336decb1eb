"""Run by torchrun from test_moe.py: experts on several processes give what one process gives, gradients included.

Each process compares what it has with the whole layer on the whole batch, in float64.
"""

from functools import partial

import torch
import torch.distributed as dist

from noise2tokens.moe.balancing import Balancing
from noise2tokens.moe.layer import MixtureOfExperts, MoEConfig, auxiliary_loss, balance
from noise2tokens.moe.parallel import add_gradients, shard_experts
from noise2tokens.transformer import Config, Decoder, SwiGLU, next_token_loss


def close(ours, right, what):
    error = (ours - right).abs().max().item() if ours.numel() else 0.0
    assert ours.shape == right.shape and error <= 1e-12, f"{what}: off by {error}"


def expected_gradient(name, parameter, rank, world):
    whole = parameter.grad
    return whole.chunk(world)[rank] if ".experts." in name else whole


def decoder_case(rank, world, hog):
    """A decoder with two mixtures; `hog` sends every token to the last process's experts."""
    torch.manual_seed(0)
    sizes = MoEConfig(experts=8, top_k=2, hidden=5, shared=1, groups=4, top_groups=2, scale=2.5)
    moe = partial(MixtureOfExperts, sizes=sizes, balancing=Balancing(speed=0.01))
    whole = Decoder(Config(17, 12, 3, 2), feed_forward=[SwiGLU, moe, moe]).double()
    if hog:
        for block in whole.blocks[1:]:
            block.feed_forward.bias[-2:] = 100.0
    shard = shard_experts(whole)
    tokens = torch.randint(17, (4, 6), generator=torch.Generator().manual_seed(1))
    own = tokens.chunk(world)[rank]

    logits = whole(tokens)
    loss = next_token_loss(logits[:, :-1], tokens[:, 1:])
    loss.backward()
    ours = shard(own)
    close(ours, logits.chunk(world)[rank], "logits")
    (next_token_loss(ours[:, :-1], own[:, 1:]) / world).backward()
    add_gradients(shard)
    for (name, part), (_, full) in zip(
        shard.named_parameters(), whole.named_parameters(), strict=True
    ):
        close(part.grad, expected_gradient(name, full, rank, world), f"gradient of {name}")
    assert torch.equal(balance(shard, dist.group.WORLD), balance(whole)), "loads"
    for mine, right in zip(shard.buffers(), whole.buffers(), strict=True):
        assert torch.equal(mine, right), "biases after their step"


def uneven_case(rank, world):
    """A layer on batches of different sizes, one of them empty, and gradients with respect to the input."""
    torch.manual_seed(2)
    sizes = MoEConfig(experts=4 * world, top_k=3, hidden=7, shared=0)
    layer = MixtureOfExperts(Config(5, 6, 1, 1), sizes=sizes).double()
    x = torch.randn(3 * world, 6, dtype=torch.float64)
    lengths = [0] + [1] * (world - 2) + [len(x) - world + 2]
    weight = torch.randn_like(x)
    whole = x.clone().requires_grad_()
    y = layer(whole)
    (y * weight).sum().backward()
    own = x.split(lengths)[rank].clone().requires_grad_()
    shard = shard_experts(layer)
    mine = shard(own)
    close(mine, y.split(lengths)[rank], "output of an uneven batch")
    (mine * weight.split(lengths)[rank]).sum().backward()
    add_gradients(shard)
    close(own.grad, whole.grad.split(lengths)[rank], "gradient of the input")
    close(shard.router.grad, layer.router.grad, "gradient of the router")
    for name in ("gate", "up", "down"):
        part = getattr(layer.experts, name).grad.chunk(world)[rank]
        close(getattr(shard.experts, name).grad, part, f"gradient of {name}")


def refusal(world):
    layer = MixtureOfExperts(Config(5, 6, 1, 1), sizes=MoEConfig(world + 1, 1, 2))
    try:
        shard_experts(layer)
    except ValueError as error:
        assert f"{world} processes do not divide {world + 1}" in str(error)
    else:
        raise AssertionError("experts that do not divide were accepted")


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for hog in (False, True):
        decoder_case(rank, world, hog)
    uneven_case(rank, world)
    refusal(world)
    assert auxiliary_loss(torch.nn.Linear(1, 1)) == 0
    print(f"process {rank} of {world}: equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
