"""Gradients on eight virtual devices beside those on one: for test_devices.py.

    export XLA_FLAGS=--xla_force_host_platform_device_count=8
    python on_eight_devices.py CASE... [--thorough CASE...]

prints what was found of each case, as a line of JSON; of the latter also by how much
memory grows with the steps, and the round trip.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import helpers
import jax
import jax.numpy as jnp
from helpers import network_arguments, network_field, relative_difference
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import reversax as rvx

NUM_DEVICES, BATCH, GRID = 8, 1024, 64
FEW, MANY = 32, 4096
FIXED = rvx.Reversible(dfx.Euler())
PUBLISHED = helpers.published(dfx.Euler())


def root_mean_square(y):
    """Diffrax's own norm makes a vector of the state first, which gathers it."""
    return jnp.sqrt(jnp.mean(y**2))


CONSTANT = dfx.ConstantStepSize()
PID = dfx.PIDController(rtol=1e-2, atol=1e-2, norm=root_mean_square)


def reaction_diffusion(t, y, args):
    """Gray and Scott's equation on a periodic grid, by the five-point Laplacian."""
    shifts = [jnp.roll(y, by, axis) for axis in (1, 2) for by in (1, -1)]
    (u, v), (spread_u, spread_v) = y, sum(shifts) - 4 * y
    of_u, of_v, feed, kill = args
    reaction = u * v**2
    du = of_u * spread_u - reaction + feed * (1 - u)
    return jnp.stack([du, of_v * spread_v + reaction - (feed + kill) * v])


class Case(NamedTuple):
    field: Callable
    args: Any
    y0: jax.Array
    spec: P
    """How the state is laid out."""
    t1: float
    solver: rvx.Reversible
    controller: Any
    vmap: bool = False
    manual: bool = False
    """Whether by `jax.shard_map`, rather than by the compiler."""

    def solve(self, args, y0, max_steps):
        """The final state and the number of steps, with those that were rejected."""
        solution = dfx.diffeqsolve(
            dfx.ODETerm(self.field),
            self.solver,
            0.0,
            self.t1,
            None if self.controller is PID else self.t1 / max_steps,
            y0,
            args,
            stepsize_controller=self.controller,
            adjoint=rvx.ReversibleAdjoint(),
            max_steps=max_steps,
            throw=False,
        )
        return solution.ys[0], solution.stats["num_steps"]

    def loss(self, args, y0, max_steps):
        solve = lambda y0: self.solve(args, y0, max_steps)
        ys, num_steps = (jax.vmap(solve) if self.vmap else solve)(y0)
        return jnp.sum(ys**2) / self.y0.size, (jnp.max(num_steps), ys)

    def value_and_grad(self, max_steps, mesh):
        """Of arguments and state; `mesh` only for a loss that is a sum by hand."""
        run = jax.value_and_grad(
            lambda args, y0: self.loss(args, y0, max_steps), (0, 1), has_aux=True
        )
        if not (self.manual and mesh is not None):
            return run

        def of_shard(args, y0):
            (value, (num_steps, ys)), (ct_args, ct_y0) = run(args, y0)
            value, ct_args = jax.lax.psum((value, ct_args), "devices")
            num_steps = jax.lax.pmax(num_steps, "devices")
            return (value, (num_steps, ys)), (ct_args, ct_y0)

        # Not checked: Diffrax's loop does not say what varies from device to device.
        return jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(P(), self.spec),
            out_specs=((P(), (P(), self.spec)), (P(), self.spec)),
            check_vma=False,
        )

    def compiled(self, max_steps, mesh=None):
        inputs = self.args, self.y0
        if mesh is not None:
            layout = NamedSharding(mesh, P()), NamedSharding(mesh, self.spec)
            inputs = jax.device_put(inputs, layout)
        program = jax.jit(self.value_and_grad(max_steps, mesh))
        return inputs, program.lower(*inputs).compile()

    def recorded_bytes(self, max_steps):
        """What is recorded of so many steps, on each device."""
        lanes = BATCH // NUM_DEVICES if self.vmap else 1
        of_times = 16 * max_steps * lanes if self.controller is PID else 0
        if not self.solver.arithmetic.exact:
            return of_times
        bits = max(256, max_steps // 4)
        if self.controller is PID:
            bits = min(4 * max_steps, 320 + max_steps // 4 + 1)
        words = -(-bits // 32)
        return of_times + 4 * words * self.y0.size // NUM_DEVICES


def batch(solver, controller=CONSTANT, **how):
    args, y0 = network_arguments(), helpers.initial_states(BATCH)
    return Case(network_field, args, y0, P("devices"), 1.0, solver, controller, **how)


def state(solver, controller=CONSTANT):
    args = jnp.array([0.16, 0.08, 0.04, 0.06])
    y0 = jax.random.uniform(jax.random.key(0), (2, GRID, GRID)) / 2
    # Along the last axis: what makes a vector of an array then gathers it.
    spec = P(None, None, "devices")
    return Case(reaction_diffusion, args, y0, spec, 4.0, solver, controller)


CASES = {
    "batch-vmap": lambda: batch(FIXED, vmap=True),
    "batch-in-field": lambda: batch(FIXED),
    "batch-shard_map": lambda: batch(FIXED, vmap=True, manual=True),
    # Two stages, since what is evaluated in one leaves nothing to be kept for later.
    "state-fixed-point": lambda: state(rvx.Reversible(dfx.Heun())),
    # To 4 its steps are long enough to drive the twins apart.
    "state-published": lambda: state(PUBLISHED)._replace(t1=2.0),
    "state-adaptive": lambda: state(FIXED, PID),
    "batch-vmap-adaptive": lambda: batch(FIXED, PID, vmap=True),
    "batch-vmap-published": lambda: batch(PUBLISHED, vmap=True),
    "batch-in-field-adaptive": lambda: batch(FIXED, PID),
    "batch-shard_map-in-field": lambda: batch(FIXED, manual=True),
    "batch-shard_map-adaptive": lambda: batch(FIXED, PID, vmap=True, manual=True),
    # In a shorter time: to 4 it takes 105 steps, for lack of damping.
    "state-published-adaptive": lambda: state(PUBLISHED, PID)._replace(t1=2.0),
}

COMMUNICATES = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\("
)


SUM = re.compile(r" all-reduce(?:-start)?\(")
CALLS = re.compile(r"(?:body|condition|calls|to_apply|true_computation)=%([\w.\-]+)")
LOOP = re.compile(r" while\(.* body=%([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def communicated(program):
    """The sizes of all arrays that a program sends from device to device, and how often
    it says so. One result may be made of several arrays."""
    results = COMMUNICATES.findall(program.as_text())
    shapes = [re.findall(r"[a-z]+\d*\[([\d,]*)\]", result) for result in results]
    size = lambda shape: math.prod(int(n) for n in shape.split(",") if n)
    return [size(shape) for result in shapes for shape in result], len(results)


def sums_in_loops(program):
    """How many sums over devices there are in the loops of a program, but for those in
    branches that are not taken: the first one of an isolated evaluation."""
    lines_of, name = {}, None
    for line in program.as_text().splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            lines_of[name] = []
        elif name is not None:
            lines_of[name].append(line)

    def called_in(line):
        branches = [x.split(", ")[1:] for x in BRANCHES.findall(line)]
        return CALLS.findall(line) + [x.lstrip("%") for xs in branches for x in xs]

    seen = set()
    lines = [line for lines in lines_of.values() for line in lines]
    to_see = [body for line in lines for body in LOOP.findall(line)]
    while to_see:
        name = to_see.pop()
        if name not in seen:
            seen.add(name)
            to_see += [x for line in lines_of[name] for x in called_in(line)]
    return sum(len(SUM.findall(line)) for name in seen for line in lines_of[name])


def round_trip(case, inputs):
    """The largest error of a round trip."""
    args, y0 = inputs

    def error(y0):
        times = 0.0, case.t1, None if case.controller is PID else case.t1 / FEW
        return rvx.round_trip_error(
            dfx.ODETerm(case.field),
            case.solver,
            *(*times, y0, args),
            stepsize_controller=case.controller,
            max_steps=FEW,
        ).error

    found = jax.jit(jax.vmap(error) if case.vmap else error)(y0)
    return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(found))


def temporary_bytes(program):
    return program.memory_analysis().temp_size_in_bytes


def is_laid_out(tree, mesh, spec):
    sharding = NamedSharding(mesh, spec)
    leaves = jax.tree.leaves(tree)
    return all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in leaves)


def facts(case, mesh, thorough):
    alone, on_one = case.compiled(FEW)
    (value, (num_steps, ys)), gradient = jax.device_get(on_one(*alone))
    inputs, on_all = case.compiled(FEW, mesh)
    (value_on_all, (num_steps_on_all, ys_on_all)), gradient_on_all = on_all(*inputs)
    ct_args, ct_y0 = gradient_on_all
    sizes, how_often = communicated(on_all)
    found = dict(
        value=abs(float(value_on_all) / float(value) - 1),
        ys=relative_difference(jax.device_get(ys_on_all), ys),
        gradient=relative_difference(jax.device_get(gradient_on_all), gradient),
        num_steps=[int(num_steps), int(num_steps_on_all)],
        laid_out=is_laid_out((ys_on_all, ct_y0), mesh, case.spec),
        replicated=is_laid_out(ct_args, mesh, P()),
        bytes_on_one=temporary_bytes(on_one),
        bytes_on_each=temporary_bytes(on_all),
        largest_sent=max(sizes),
        how_often_sent=how_often,
        state_size=case.y0.size,
        parameters_size=helpers.flat(case.args).size,
        sums_in_loops=sums_in_loops(on_all),
    )
    if thorough:
        _, of_many = case.compiled(MANY, mesh)
        found |= dict(
            growth=temporary_bytes(of_many) - temporary_bytes(on_all),
            recorded=case.recorded_bytes(MANY) - case.recorded_bytes(FEW),
            round_trip=round_trip(case, inputs),
        )
    return found


def main():
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", choices=list(CASES))
    parser.add_argument("--thorough", nargs="*", choices=list(CASES), default=[])
    asked = parser.parse_args()
    assert jax.device_count() == NUM_DEVICES, jax.devices()
    types = (AxisType.Auto,)
    mesh = jax.make_mesh((NUM_DEVICES,), ("devices",), axis_types=types)
    for name in asked.cases:
        found = facts(CASES[name](), mesh, name in asked.thorough)
        print(json.dumps({"case": name} | found), flush=True)


if __name__ == "__main__":
    main()
