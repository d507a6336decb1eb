"""Run by torchrun from test_deepseek_v3.py: training on several processes is that of one, and goes on after a loss.

v3_processes.py equal                 gradients in float64 against one process with the whole batch
v3_processes.py train DIR STEPS       a training; with a third argument, process 1 is killed after that step once
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from noise2tokens.deepseek_v3.config import tiny
from noise2tokens.deepseek_v3.mtp import MultiToken, prediction_loss
from noise2tokens.deepseek_v3.parallel import backward, distribute, start, train
from noise2tokens.moe.balancing import Balancing
from noise2tokens.moe.layer import auxiliary_loss, balance, mixtures


def total(model, inputs, targets):
    main, depths = model.losses(inputs, targets)
    return main + prediction_loss(depths, 0.3) + auxiliary_loss(model)


def equal():
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    balancing = Balancing(alpha=0.01, speed=0.01)
    whole = MultiToken(tiny(37, predictions=2, width=32, layers=2), balancing=balancing).double()
    sharded = distribute(whole, init_device_mesh("cpu", (world,)))
    tokens = torch.randint(37, (4, 13), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    total(whole, inputs, targets).backward()
    own = [part.chunk(world)[rank] for part in (inputs, targets)]
    backward(total(sharded, *own), sharded)
    names = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.shape == names[name].shape, name
        held = parameter.to_local().numel()
        assert held <= -(-parameter.shape[0] // world) * parameter[0].numel(), name
        error = (parameter.grad.full_tensor() - names[name].grad).abs().max().item()
        assert error <= 1e-12, f"gradient of {name}: off by {error}"
    assert torch.equal(balance(sharded, dist.group.WORLD), balance(whole)), "loads"
    print(f"process {rank} of {world}: equal")


def killed_once(folder, at):
    def after_step(step):
        mark = folder / "killed"
        if step == at and dist.get_rank() == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return after_step


def main():
    torch.set_num_threads(1)
    start()
    if sys.argv[1] == "equal":
        equal()
    else:
        folder = Path(sys.argv[2])
        options = {"after_step": killed_once(folder, int(sys.argv[4]))} if sys.argv[4:] else {}
        model = train(folder, steps=int(sys.argv[3]), every=3, batch=4, length=16, **options)
        for layer in mixtures(model):
            biases = [torch.empty_like(layer.bias) for _ in range(dist.get_world_size())]
            dist.all_gather(biases, layer.bias)
            assert layer.bias.any() and all(map(torch.equal, biases, biases[1:])), "biases"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
