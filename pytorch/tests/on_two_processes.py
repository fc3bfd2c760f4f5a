"""One of two processes that train together; started by test_distributed.py.

python on_two_processes.py RANK DIRECTORY
"""

import sys

import torch
import torch.distributed as dist
from helpers import Network, start
from reversax_torch import odeint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.field = Network()

    def forward(self, y0):
        return odeint(self.field, y0, T, rtol=1e-6, atol=1e-6)[-1]


def loss_of(model, y0):
    return model(y0).pow(2).sum(dim=1).mean()


def main(rank, directory):
    torch.set_num_threads(1)
    # A file, not a port, which another process might take in between.
    address = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = Model()
    wrapped, calls = DistributedDataParallel(model), []

    def count(state, bucket):
        calls.append(1)
        work = dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return work.then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, count)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    share = start(batch=8)[4 * rank : 4 * rank + 4]
    loss_of(wrapped, share).backward()
    gradient = [p.grad for p in model.parameters()]
    torch.save((gradient, len(calls)), f"{directory}/{rank}.pt")
    # First the wrapper: were it the last that holds the group, it would join the
    # threads of gloo without giving up the interpreter's lock, which one of them may
    # wait for in order to end (PyTorch 2.13).
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
