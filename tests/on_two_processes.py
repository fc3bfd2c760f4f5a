"""Trains over the devices of two processes, or on one device: for test_devices.py.

    python on_two_processes.py PORT PROCESS_ID WAY

prints the losses, the last gradient and the parameters as a line of JSON.
"""

import hashlib
import json
import sys

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from helpers import flat, initial_states, network_arguments, network_field
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import reversax as rvx

BATCH, STEPS = 64, 3
WAYS = ("jit", "shard_map")


def loss_fn(args, y0):
    def solve(y0):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(network_field),
            rvx.Reversible(dfx.Euler()),
            *(0.0, 1.0, 1 / 32, y0, args),
            adjoint=rvx.ReversibleAdjoint(),
            max_steps=32,
        )
        return jnp.sum(solution.ys**2)

    return jnp.sum(jax.vmap(solve)(y0)) / BATCH


def update_in_shards(mesh):
    def of_shard(args, y0):
        return jax.lax.psum(jax.value_and_grad(loss_fn)(args, y0), "devices")

    specs = dict(in_specs=(P(), P("devices")), out_specs=P())
    return jax.shard_map(of_shard, mesh=mesh, **specs, check_vma=False)


def train(way):
    """Gradient descent on all the devices that there are."""
    types = (AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=types)
    # Each process puts its own part of the batch on its own devices.
    states = np.asarray(initial_states(BATCH))
    mine = np.split(states, jax.process_count())[jax.process_index()]
    put = lambda x, spec: jax.make_array_from_process_local_data(
        NamedSharding(mesh, spec), np.asarray(x)
    )
    y0 = put(mine, P("devices"))
    args = jax.tree.map(lambda x: put(x, P()), network_arguments())
    by_compiler = jax.value_and_grad(loss_fn)
    run = jax.jit(by_compiler if way == "jit" else update_in_shards(mesh))
    losses, gradient = [], None
    for _ in range(STEPS):
        loss, gradient = run(args, y0)
        args = jax.tree.map(lambda x, ct: x - 0.1 * ct, args, gradient)
        losses.append(float(loss))
    args = np.asarray(flat(args))
    return dict(
        losses=losses,
        gradient=np.asarray(flat(gradient)).tolist(),
        digest=hashlib.sha256(args.tobytes()).hexdigest(),
        devices=jax.device_count(),
    )


if __name__ == "__main__":
    port, process_id, way = sys.argv[1:]
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=2,
        process_id=int(process_id),
        initialization_timeout=200,
    )
    print(json.dumps(train(way)), flush=True)
