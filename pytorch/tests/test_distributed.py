"""Two processes on one machine that train together."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from helpers import relative, start
from on_two_processes import Model, loss_of

SCRIPT = Path(__file__).with_name("on_two_processes.py")


def test_gradient_is_that_of_one_process_and_hooks_are_called_once(tmp_path):
    paths = os.pathsep.join(filter(None, [str(SCRIPT.parent), *sys.path]))
    arguments = lambda rank: [sys.executable, SCRIPT, str(rank), tmp_path]
    both = [
        subprocess.Popen(arguments(rank), env={**os.environ, "PYTHONPATH": paths})
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=100) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    model = Model()
    # Each with the steps of its own half of the batch.
    halves = [start(batch=8)[:4], start(batch=8)[4:]]
    loss = sum(loss_of(model, half) / 2 for half in halves)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for rank in range(2):
        found, calls = torch.load(tmp_path / f"{rank}.pt")
        assert relative(found, expected) < 1e-14
        # One bucket, and four parameters.
        assert calls == 1 + 4
