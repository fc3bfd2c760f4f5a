"""The gradient of `ReversibleAdjoint` is that of the discrete solve.

The oracle is direct differentiation of the same scheme: the same `Reversible` solver
under `RecursiveCheckpointAdjoint`, which knows nothing of reversibility, with as many
checkpoints as there may be steps: with fewer it loses values that are saved at the ends
of constant steps (docs/ends_of_steps.md), as some are here. Two programs
that sum in different orders agree to round-off: the bound is 1e-11 over 1,000 steps,
where about 1e-14 was measured for the published scheme (`coupling_parameter**-1000` is
2.7) and 1e-15 in fixed point. The symmetric coupling in floating point restarts from
kept pairs, and is as exact as its tolerance of 1.5e-8.
"""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    BASES,
    SCHEMES,
    SameScheme,
    finite_sum_of_squares,
    in_cells,
    initial_states,
    network_arguments,
    network_field,
    nonuniform,
    quick,
    relative_difference,
)

import reversax as rvx

BOUNDS = {"fixed-point": 1e-11, "published": 1e-11, "floating-point": 1e-7}
NUM_STEPS, MAX_STEPS = 1000, 1600

JUMPS = jnp.array([0.35, 0.7])


def jumping_field(t, y, args):
    """Jumps at several times. Controllers are told of the two `JUMPS` at most, so that
    they must reject steps to get past the others."""
    factor = jnp.where(t < 0.35, 1.0, -0.7)
    for time, value in ((0.4403, 0.9), (0.5227, 0.4), (0.6119, -0.5), (0.7, 1.0)):
        factor = jnp.where(t > time, value, factor)
    return network_field(t, y, args) * factor


# At steps of `dtmax` the error estimate passes, and at a jump it does not: how large it
# is there depends on the base.
TOLERANCES = {
    **{"Midpoint": 1e-6, "Ralston": 1e-6, "Bosh3": 1e-7},
    **{"Tsit5": 1e-8, "Dopri5": 1e-8, "Dopri8": 1e-9},
}


def controllers(base_name):
    """Name -> (controller, dt0, field). All take about 1,000 steps, and those that
    adapt reject some."""
    tolerance = TOLERANCES.get(base_name, 1e-5)
    # After a jump steps are short, and their estimates nothing but round-off. They are
    # to grow by the most they may, and not by as much as round-off says.
    pid = dfx.PIDController(
        rtol=tolerance, atol=tolerance, icoeff=1.0, factormax=2.0, dtmax=1.2e-3
    )
    clip_steps = dfx.ClipStepSizeController(pid, step_ts=jnp.linspace(0.1, 0.9, 5))
    clip_jumps = dfx.ClipStepSizeController(
        pid, step_ts=jnp.array([0.2, 0.5]), jump_ts=JUMPS, store_rejected_steps=32
    )
    step_to = dfx.StepTo(nonuniform(0, 1, NUM_STEPS + 1))
    return {
        "constant": (dfx.ConstantStepSize(), 1 / NUM_STEPS, network_field),
        "step-to": (step_to, None, network_field),
        "pid": (pid, None, jumping_field),
        "clip-steps": (clip_steps, None, jumping_field),
        "clip-jumps": (clip_jumps, None, jumping_field),
    }


CONTROLLERS = list(controllers("Heun"))

# One solve saves in every way at once. The loss weighs the ways by an input, so that
# one compiled gradient serves them all.
SUBS = {
    "t0": dfx.SubSaveAt(t0=True),
    "t1": dfx.SubSaveAt(t1=True),
    "ts": dfx.SubSaveAt(ts=jnp.array([0.0, 0.1234, 0.1235, 0.35, 0.6, 0.6, 1.0])),
    "steps": dfx.SubSaveAt(steps=True),
    "every-third-step": dfx.SubSaveAt(steps=3, t1=True),
    "fn": dfx.SubSaveAt(
        ts=jnp.array([0.3, 0.9]), fn=lambda t, y, args: jnp.sin(y) * args[1][0] + t
    ),
    "all-in-one": dfx.SubSaveAt(
        t0=True, t1=True, ts=jnp.array([0.21, 0.77]), steps=7, fn=lambda t, y, a: y**2
    ),
}


def solve(base_name, controller_name, scheme, adjoint, args, y0, saveat):
    controller, dt0, field = controllers(base_name)[controller_name]
    solver = rvx.Reversible(BASES[base_name], *SCHEMES[scheme])
    return dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        0.0,
        1.0,
        dt0,
        y0,
        args,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=MAX_STEPS,
    )


def gradients_of_each_output(base_name, controller_name, batching, scheme, adjoint):
    """The gradient of the loss of each of `SUBS`, and the number of rejected steps."""
    saveat = dfx.SaveAt(subs=SUBS)

    adapts = controller_name not in ("constant", "step-to")

    @ft.partial(jax.jit, **quick(adjoint, SCHEMES[scheme][1], adapts=adapts))
    @ft.partial(jax.grad, has_aux=True)
    def gradient(args_and_y0, weights):
        args, y0 = args_and_y0
        names = base_name, controller_name, scheme
        run = lambda y0: solve(*names, adjoint, args, y0, saveat)
        solution = run(y0) if batching == "batched" else jax.vmap(run)(y0)
        losses = [finite_sum_of_squares(solution.ys[name]) for name in SUBS]
        return jnp.stack(losses) @ weights, solution.stats["num_rejected_steps"]

    point = (network_arguments(), initial_states())
    results = [gradient(point, weights) for weights in jnp.eye(len(SUBS))]
    return {name: g for name, (g, _) in zip(SUBS, results, strict=True)}, results[0][1]


def check_cell(base_name, controller_name, batching, scheme):
    ours, rejected = gradients_of_each_output(
        base_name, controller_name, batching, scheme, rvx.ReversibleAdjoint()
    )
    direct, _ = gradients_of_each_output(
        *(base_name, controller_name, batching, scheme),
        SameScheme(dfx.RecursiveCheckpointAdjoint(checkpoints=MAX_STEPS)),
    )
    differences = {name: relative_difference(ours[name], direct[name]) for name in SUBS}
    assert max(differences.values()) <= BOUNDS[scheme], differences
    # This one has no estimate but the gap, and both its halves look at the middle of
    # the step only: they agree on which side of a jump they are.
    may_overlook = base_name == "own-midpoint"
    if controller_name in ("pid", "clip-steps", "clip-jumps") and not may_overlook:
        assert jnp.all(rejected > 0), "the case is meant to reject steps"


# (Given steps, lanes and the published scheme are daily in `test_times.py`.)
CELLS = [
    (base, controller, batching, list(SCHEMES)[(i + j + k) % len(SCHEMES)])
    for i, base in enumerate(BASES)
    for j, controller in enumerate(CONTROLLERS)
    for k, batching in enumerate(("batched", "vmap"))
]
DAILY = [
    ("Euler", "constant", "batched", "fixed-point"),
]


@pytest.mark.parametrize(
    ("base", "controller", "batching", "scheme"),
    in_cells([*DAILY, *(cell for cell in CELLS if cell not in DAILY)], DAILY),
)
def test_gradient_of_every_kind_of_output_is_that_of_direct_differentiation(
    base, controller, batching, scheme
):
    check_cell(base, controller, batching, scheme)
