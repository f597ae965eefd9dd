"""Two processes over gloo follow one: FSDP2's `fully_shard` and DistributedDataParallel."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from table import METHODS, batch, loss, model, perturb

import deltatune as dt

STEPS = 4


def losses(net, adapter, given, whole):
    """`whole` maps a model to the module whose forward is called."""
    run = whole(net)
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.05)
    out = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(run, given)
        value.backward()
        optimizer.step()
        out.append(value.item())
    return out


def shard(net):
    from torch.distributed.fsdp import fully_shard

    for block in net.model.layers:
        fully_shard(block)
    fully_shard(net)
    return net


def work(rank, port, kind, method, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        if kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh

            init_device_mesh("cpu", (2,))
        net = model("llama")
        adapter = perturb(dt.attach(net, METHODS[method]))
        whole = shard if kind == "fsdp" else torch.nn.parallel.DistributedDataParallel
        out = losses(net, adapter, batch(net, 4), whole)
        queue.put((rank, out, sum(p.grad is not None for p in adapter.parameters())))
    finally:
        dist.destroy_process_group()


def two(kind, method):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(work, (port, kind, method, queue), nprocs=2, join=True)
    return [queue.get() for _ in range(2)]


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_two_processes_follow_one(kind, method):
    net = model("llama")
    adapter = perturb(dt.attach(net, METHODS[method]))
    want = losses(net, adapter, batch(net, 4), lambda m: m)
    assert want[-1] < want[0]
    for _, got, grads in two(kind, method):
        assert got == pytest.approx(want, abs=1e-5) and grads == len(list(adapter.parameters()))
