"""Memory that is held between the passes, and at the peak of both."""

import pytest
import torch
import torchdiffeq
from helpers import Network
from reversax_torch import odeint
from torch.profiler import profile


def peak(fn, steps):
    """Bytes, beside those that there were before, as the allocator tells."""
    field = Network(width=64, dtype=torch.float32)
    y0 = torch.randn(64, 3)
    options = {"num_steps": steps} if fn is odeint else {"step_size": 1 / steps}
    t = torch.tensor([0.0, 1.0])
    with profile(profile_memory=True) as record:
        ys = fn(field, y0, t, method="euler", options=options)
        ys[-1].sum().backward()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_memory_hardly_grows_with_the_steps():
    few, many = peak(odeint, 32), peak(odeint, 128)
    # 32 bytes of shed bits for each of 192 numbers.
    assert many - few < 16_000
    assert many < 0.2 * peak(torchdiffeq.odeint, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_kept_between_the_passes_are_two_words_of_each_number_and_bits(dtype):
    y0 = torch.randn(1000, dtype=dtype, requires_grad=True)
    t = torch.tensor([0.0, 1.0])
    ys = odeint(lambda t, y: -y, y0, t, method="euler", options={"num_steps": 1024})
    walk = ys.grad_fn.walk
    # 256 bits, of which a word of 64 has up to 62.
    assert len(walk.bits) == 5
    assert all(word.numel() == 1000 for word, _ in walk.bits)
    held = [x for x in vars(walk).values() if isinstance(x, torch.Tensor)]
    assert sum(x.numel() for x in held) == 1
