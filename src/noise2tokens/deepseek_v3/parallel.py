"""Training on several processes: what is dense lies in shards (FSDP2), experts live on one process each, runs resume.

torchrun --nproc-per-node=2 -m noise2tokens.deepseek_v3.parallel --checkpoints DIR --steps 30 --every 10

Each process reads its part of every batch. FSDP2 gathers a block's matrices when the block computes and averages their
gradients; tokens travel to their experts and back (`moe.parallel`). With W processes, each holds one W-th of all
matrices and of the optimizer's moments, either way.
"""

import argparse
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard

from noise2tokens.deepseek_v3.config import tiny
from noise2tokens.deepseek_v3.mtp import MultiToken, prediction_loss
from noise2tokens.moe.balancing import Balancing
from noise2tokens.moe.layer import Experts, auxiliary_loss, balance
from noise2tokens.moe.parallel import shard_experts
from noise2tokens.text import Bytes, corpus, documents, split_files, windows
from noise2tokens.training import seed_everything

MATRICES = ("gate", "up", "down")  # of the experts


def start() -> None:
    """Let the processes that torchrun has started meet; those of each restart at a place of their own.

    torchrun keeps its store over a restart. Under the same names, a process would find there the addresses of those
    that are dead, and wait for them.
    """
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def distribute(model: MultiToken, mesh: DeviceMesh) -> MultiToken:
    """Return a copy of a model whose matrices lie in shards on the processes of a mesh of one dimension.

    Experts are whole, each on one process; all other parameters are cut by rows, and gathered for each block when it
    computes. Every parameter is a DTensor, so that a checkpoint knows which part of what each process holds.

    Raises:
        ValueError: If the processes do not divide the experts.
    """
    model = shard_experts(model, mesh.get_group())
    for experts in all_experts(model):
        for name in MATRICES:
            own = DTensor.from_local(getattr(experts, name).detach(), mesh, [Shard(0)])
            setattr(experts, name, nn.Parameter(own))
        experts.compute = partial(_of_own, experts.compute)
    at_home = {p for experts in all_experts(model) for p in experts.parameters()}
    decoders = [model.main, *(depth.decoder for depth in model.depths)]
    for block in [block for decoder in decoders for block in decoder.blocks] + [model]:
        fully_shard(block, mesh=mesh, ignored_params=at_home)
    register_fsdp_forward_method(model, "losses")
    return model


def all_experts(model: nn.Module) -> list[Experts]:
    """The routed experts of each layer that has them."""
    return [module for module in model.modules() if isinstance(module, Experts)]


def _of_own(compute, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, *matrices: DTensor):
    return compute(x_TD, weights_TK, experts_TK, *(matrix.to_local() for matrix in matrices))


def backward(loss: Tensor, model: MultiToken) -> None:
    """Compute gradients of the mean of the processes' losses.

    FSDP2 averages what it has sharded. Experts have the sum over all processes' tokens, so theirs is divided here.
    """
    loss.backward()
    for experts in all_experts(model):
        for parameter in experts.parameters():
            if parameter.grad is not None:
                parameter.grad /= dist.get_world_size()


class Progress:
    """A model and its optimizer as one thing that `torch.distributed.checkpoint` saves and loads."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step = state["step"]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole: its table of contents is written last."""
    whole = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def save(progress: Progress, folder: Path) -> None:
    """Write a checkpoint of its own for this step."""
    dcp.save({"progress": progress}, checkpoint_id=folder / f"step-{progress.step}")


def resume(progress: Progress, folder: Path) -> None:
    """Load the newest whole checkpoint, if there is one."""
    newest = latest(folder)
    if newest is not None:
        dcp.load({"progress": progress}, checkpoint_id=newest)


def batches(
    stream: Tensor, seed: int, first: int, last: int, batch: int, length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's part of each step's batch; what a step draws depends on its number alone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, last):
        draw = windows(stream, length, torch.Generator().manual_seed(1_000_003 * seed + step))
        yield tuple(part.chunk(world)[rank] for part in draw(batch))


def train(
    checkpoints: Path,
    *,
    steps: int,
    every: int,
    batch: int = 8,
    length: int = 64,
    seed: int = 0,
    after_step=lambda step: None,
) -> MultiToken:
    """Train a small model on code, from the newest checkpoint in a folder on, and write the losses beside them.

    Args:
        checkpoints: Folder, which all processes see; "losses.jsonl" in it gets a line for each step.
        steps: In all, those before the checkpoint among them.
        every: Steps between two checkpoints.
        batch: Windows a step, of all processes together; these must divide it.
        length: Bytes of a window.
        seed: Of weights and windows.
        after_step: Called with the number of each step, from 1.

    Raises:
        ValueError: If the processes do not divide the batch, or steps or every are below 1.
    """
    if steps < 1 or every < 1 or batch % dist.get_world_size():
        need = f"steps and every from 1, and a batch that {dist.get_world_size()} processes divide"
        raise ValueError(f"need {need}; got {steps}, {every} and {batch}")
    seed_everything(seed)
    whole = MultiToken(
        tiny(Bytes().vocab_size, width=32), balancing=Balancing(alpha=1e-4, speed=0.005)
    )
    model = distribute(whole, init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    progress = Progress(model, optimizer)
    resume(progress, checkpoints)
    stream = torch.cat(documents(split_files(corpus())[0], Bytes()))
    log = checkpoints / "losses.jsonl"
    for inputs, targets in batches(stream, seed, progress.step, steps, batch, length):
        main, depths = model.losses(inputs, targets)
        backward(main + prediction_loss(depths, 0.3) + auxiliary_loss(model), model)
        optimizer.step()
        optimizer.zero_grad()
        balance(model, dist.group.WORLD)
        progress.step += 1
        mean = main.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            with log.open("a") as lines:
                lines.write(json.dumps({"step": progress.step, "loss": mean.item()}) + "\n")
        if progress.step % every == 0:
            save(progress, checkpoints)
        after_step(progress.step)
    return model


def main() -> None:
    """Train as torchrun's arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start()
    train(
        arguments.checkpoints,
        steps=arguments.steps,
        every=arguments.every,
        seed=arguments.seed,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
