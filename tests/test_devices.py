"""Many devices and processes, on JAX's own runtime: what they find is what one finds.

The devices are virtual ones, of processes that the tests start.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import on_two_processes
import pytest
from helpers import relative_difference

TESTS = Path(__file__).parent
TIMEOUT = 300


def start(program, num_devices, *arguments):
    count = f"--xla_force_host_platform_device_count={num_devices}"
    env = dict(os.environ, XLA_FLAGS=count, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    command = [sys.executable, str(TESTS / program), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def lines_of(processes):
    """What each printed, line by line; none is left running. (Gloo prints too.)"""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)
        printed = [process.communicate(timeout=TIMEOUT) for process in processes]
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, errors[-4000:]
    ours = lambda out: [line for line in out.splitlines() if line.startswith("{")]
    return [[json.loads(line) for line in ours(out)] for out, _ in printed]


# Sums over devices are taken in another order than on one. Measured: up to 2e-16.
BOUND = 1e-13


# Over all devices, for which each waits. Going back there is one, of the cotangents of
# parameters (of a state that is spread out, also of its borders); none going forwards.
SUMS_IN_LOOPS = {
    "batch-vmap": 1,
    "batch-in-field": 1,
    "batch-shard_map": 0,
    "batch-shard_map-in-field": 0,
    "state-fixed-point": 2,
}


def check(found):
    assert max(found["value"], found["ys"], found["gradient"]) <= BOUND
    of_one, of_all = found["num_steps"]
    assert of_one == of_all
    if "adaptive" in found["case"]:
        assert of_all < 32, "the solve was cut short"
    assert found["laid_out"], "the state or its cotangent is not laid out as it was"
    assert found["replicated"]
    # An eighth, and a few numbers that each device has. Measured: up to 1.03.
    assert found["bytes_on_each"] <= 1.1 * found["bytes_on_one"] / 8
    # Nothing of the size of a device's part of the state goes from device to device:
    # rows at the borders of a grid, cotangents of parameters, and single numbers do.
    assert found["largest_sent"] <= found["state_size"] / 64
    assert found["sums_in_loops"] <= SUMS_IN_LOOPS.get(found["case"], math.inf)
    if "shard_map" in found["case"]:
        assert found["how_often_sent"] <= 2, "once for sums, once for a count of steps"


def check_thoroughly(found):
    # The shed bits and recorded times of a device's part, and nothing else.
    # (In some cases a buffer as large as the part, 4,096 bytes in double precision, is
    # shared by another at 32 steps only; at 4,096 and at 16,384 it is the same one.)
    of_part = 8 * found["state_size"] / 8
    slack = max(0.02 * found["bytes_on_each"], of_part)
    assert abs(found["growth"] - found["recorded"]) <= slack
    if "published" in found["case"]:
        # Round-off of 32 steps, beside a state of size one.
        assert 0 < found["round_trip"] < 1e-13
    else:
        assert found["round_trip"] == 0


BATCHES = ["batch-vmap", "batch-in-field", "batch-shard_map"]
STATES = ["state-fixed-point", "state-published", "state-adaptive"]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(["batch-vmap", "batch-shard_map"], marks=pytest.mark.heavy),
        ["state-fixed-point"],
    ],
    ids=["batch", "state"],
)
def test_eight_devices_find_the_gradient_of_one_in_an_eighth_of_its_memory(cases):
    """(That memory does not grow with the steps, on one device: `test_memory.py`.)"""
    (found,) = lines_of([start("on_eight_devices.py", 8, *cases)])
    assert [row["case"] for row in found] == cases
    for row in found:
        check(row)


OTHERS = [
    "batch-vmap-adaptive",
    "batch-vmap-published",
    "batch-in-field-adaptive",
    "batch-shard_map-in-field",
    "batch-shard_map-adaptive",
    "state-published-adaptive",
]


@pytest.mark.heavy
@pytest.mark.parametrize("case", [*BATCHES, *STATES, *OTHERS])
def test_memory_and_round_trip_on_eight_devices_are_as_on_one(case):
    ((found,),) = lines_of([start("on_eight_devices.py", 8, case, "--thorough", case)])
    check(found)
    check_thoroughly(found)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# (Eight devices of one process are tested daily.)
@pytest.mark.heavy
@pytest.mark.parametrize("way", ["shard_map", "jit"])
def test_two_processes_train_as_one_device_does(way):
    port = free_port()
    started = [start("on_two_processes.py", 2, port, i, way) for i in range(2)]
    (first,), (second,) = lines_of(started)
    assert first == second
    assert first["devices"] == 4
    alone = on_two_processes.train(way)
    # As above; three steps of training pass it on. Measured: 2e-16.
    assert np.allclose(first["losses"], alone["losses"], rtol=1e-12, atol=0)
    one, two = (np.asarray(x["gradient"]) for x in (alone, first))
    assert relative_difference(two, one) <= 1e-12
