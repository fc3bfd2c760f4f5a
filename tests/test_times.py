"""Derivatives with respect to times: every case against direct differentiation.

Diffrax differentiates the times of the steps as it computes them, with one exception:
the factors by which `PIDController` changes a step count as constants, and so does the
first step that it chooses for itself. No time has a gradient that is silently zero.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    BASES,
    SCHEMES,
    finite_sum_of_squares,
    in_cells,
    network_field,
    quick,
    relative_difference,
)
from programs import ARGS, DIRECT, OURS, SOLVER, Y0, agree_in_each_entry, solve

import reversax as rvx

TIMES = dict(
    t0=jnp.array(0.1),
    t1=jnp.array(1.0),
    dt0=jnp.array(0.083),  # 11 steps, the last ten a little shorter
    marks=jnp.array([0.3, 0.55, 0.62]),
    ts=jnp.array([0.15, 0.31, 0.7, 0.95]),
)
DIRECTIONS = {
    "forwards": TIMES,
    "backwards": {name: 1.1 - x for name, x in TIMES.items()} | {"dt0": -TIMES["dt0"]},
}
PARAMETERS = dict(y0=Y0, args=ARGS)
PID = dfx.PIDController(rtol=1e-3, atol=1e-3, pcoeff=0.3, icoeff=0.4)


def controlled(p, controller=PID, **clip):
    if clip:
        controller = dfx.ClipStepSizeController(PID, **clip)
    # The first steps are too long and are rejected.
    return dict(dt0=5 * p["dt0"], stepsize_controller=controller)


def step_to(p):
    ts = jnp.concatenate([p["t0"][None], p["marks"], p["t1"][None]])
    return dict(dt0=None, stepsize_controller=dfx.StepTo(ts))


STEPPING = {
    "constant": lambda p: dict(dt0=p["dt0"]),
    "step-to": step_to,
    "pid": controlled,
    "pid-from-its-own-step": lambda p: controlled(p) | dict(dt0=None),
    "jump-ts": lambda p: controlled(p, jump_ts=p["marks"]),
    "step-and-jump-ts": lambda p: controlled(
        p, step_ts=p["marks"][:1], jump_ts=p["marks"][1:]
    ),
    "stored-rejections": lambda p: controlled(
        p, step_ts=p["marks"], store_rejected_steps=16
    ),
}


def of_time(t, y, args):
    return y * jnp.sin(t) + args[1][0] * t


def from_end_to_end(p):
    return jnp.concatenate([p["t0"][None], p["ts"], p["t1"][None]])


SAVING = {
    "t1": lambda p: dfx.SaveAt(t1=True),
    "ends-and-ts": lambda p: dfx.SaveAt(
        t0=True, t1=True, ts=from_end_to_end(p), fn=of_time
    ),
    "steps": lambda p: dfx.SaveAt(steps=True, t0=True),
    "every-third-step": lambda p: dfx.SaveAt(steps=3, t1=True, fn=of_time),
    "dense": lambda p: dfx.SaveAt(dense=True),
    "tree": lambda p: dfx.SaveAt(
        subs=[
            dfx.SubSaveAt(t0=True, t1=True, ts=p["ts"], fn=of_time),
            dict(a=dfx.SubSaveAt(ts=from_end_to_end(p), steps=5), b=None),
        ]
    ),
}


def outputs(adjoint, p, stepping="constant", saving="t1", **kwargs):
    """What a solve gives, its times among it, and how many steps it took."""
    kwargs = STEPPING[stepping](p) | dict(saveat=SAVING[saving](p)) | kwargs
    times = dict(t0=p["t0"], t1=p["t1"])
    solution = solve(adjoint, p["y0"], p["args"], **times, **kwargs)
    if saving == "dense":
        first, second, *_, last = p["ts"]
        saved = (
            solution.evaluate(first),
            solution.evaluate(first, second),
            solution.derivative(last),
            solution.evaluate(p["t1"]),
        )
    else:
        saved = solution.ts, solution.ys
    return saved, {k: v for k, v in solution.stats.items() if k != "max_steps"}


def value_and_gradient(run, adjoint, at, options):
    """Of the sum of squares of what `run` gives; and what it gives beside."""

    @eqx.filter_value_and_grad(has_aux=True)
    def of(p):
        saved, beside = run(adjoint, p)
        return finite_sum_of_squares(saved), beside

    return eqx.filter_jit(of, **options)(at)


def agree(run, at, bound=1e-11, arithmetic=SOLVER.arithmetic, quickly=True):
    """`run(adjoint, p)` has the same value and gradient under both adjoints, in each
    entry of `p`; where the direct gradient is zero, ours is. Returns what it gave
    beside, and the direct gradient.

    Measured: as a rule 2e-13; up to 4e-12 where steps are cut to end at given times,
    since a derivative in the ends of a short step divides by its length. (A gradient
    that is small beside the others, such as that in `dt0` of a controller that soon
    forgets it, is what remains of larger terms.)"""
    options = lambda adjoint: quick(adjoint, arithmetic) if quickly else {}
    of = lambda adjoint: value_and_gradient(run, adjoint, at, options(adjoint))
    (value, beside), ours = of(OURS)
    (expected, expected_beside), direct = of(DIRECT)
    assert abs(value - expected) <= 1e-13 * max(1.0, abs(expected))
    assert eqx.tree_equal(beside, expected_beside)
    agree_in_each_entry(ours, direct, bound)
    return beside, direct


DAILY = [
    ("pid", "ends-and-ts", "backwards"),
]


CELLS = [
    (stepping, saving, direction)
    for stepping in STEPPING
    for saving in SAVING
    for direction in DIRECTIONS
    if saving != "t1"
    and (direction == "forwards" or saving in ("ends-and-ts", "dense"))
]


@pytest.mark.parametrize(
    ("stepping", "saving", "direction"),
    in_cells(CELLS, DAILY),
)
def test_gradient_in_all_times_is_that_of_direct_differentiation(
    stepping, saving, direction
):
    """Jointly with that in the state and the parameters."""
    run = lambda adjoint, p: outputs(adjoint, p, stepping, saving)
    stats, direct = agree(run, PARAMETERS | DIRECTIONS[direction])
    for name in ("t0", "t1"):
        assert abs(direct[name]) > 0.05, "the oracle is blind"
    if stepping == "pid" or (stepping.startswith("pid") and direction == "forwards"):
        assert stats["num_rejected_steps"] > 0


@pytest.mark.heavy  # Daily: the times of a controller alone, below.
@pytest.mark.parametrize("name", ["t1", "t0", "dt0"])
def test_one_time_alone_may_be_differentiated(name):
    rest = PARAMETERS | TIMES
    run = lambda adjoint, p: outputs(adjoint, rest | p)
    agree(run, {name: TIMES[name]})


@pytest.mark.parametrize(
    "stepping", ["step-to", pytest.param("jump-ts", marks=pytest.mark.heavy)]
)
def test_the_times_of_a_controller_alone_may_be_differentiated(stepping):
    """Of `StepTo(ts)` those in between: its ends only have to be `t0` and `t1`, and it
    is by these that they are differentiated."""
    rest = PARAMETERS | TIMES
    run = lambda adjoint, p: outputs(adjoint, rest | p, stepping)
    _, direct = agree(run, {"marks": TIMES["marks"]})
    assert jnp.all(jnp.abs(direct["marks"]) > 1e-3)


@pytest.mark.heavy  # Daily: lanes with events, in `test_precision.py`.
@pytest.mark.parametrize(
    ("stepping", "saving"),
    [
        ("constant", "t1"),
        ("constant", "ends-and-ts"),
        ("pid", "steps"),
        ("jump-ts", "dense"),
        ("constant", "dense"),
    ],
)
def test_lanes_with_ends_of_their_own_that_begin_together(stepping, saving):
    ends = jnp.array([0.97, 1.0, 1.6])

    def run(adjoint, p):
        one = lambda t1: outputs(adjoint, p | dict(t1=t1), stepping, saving)
        return jax.vmap(one)(p["t1"])

    # Where steps meet jumps the round-off of `quick` is 1e-11 in dense output, for
    # Diffrax's own two adjoints too; that of XLA's fusion emitters is 1e-13.
    quickly = (stepping, saving) != ("jump-ts", "dense")
    agree(run, PARAMETERS | TIMES | dict(t1=ends), quickly=quickly)


def test_a_gradient_for_each_lane_of_times_that_all_share():
    """`vmap` of `grad`: only the states differ, and the times must not be summed."""
    states, rest = jnp.stack([Y0, -2 * Y0]), dict(args=ARGS) | TIMES

    def gradients(adjoint):
        loss = lambda t, y0: finite_sum_of_squares(
            outputs(adjoint, rest | dict(y0=y0, t0=t[0], t1=t[1]))[0]
        )
        of_each = jax.vmap(jax.grad(loss), in_axes=(None, 0))
        return jax.jit(of_each, **quick(adjoint))((TIMES["t0"], TIMES["t1"]), states)

    assert relative_difference(gradients(OURS), gradients(DIRECT)) <= 1e-12


@pytest.mark.heavy
def test_times_that_are_computed_from_the_parameters():
    def run(adjoint, p):
        width = jax.nn.softplus(p["args"][1][0])
        times = {name: width * x for name, x in TIMES.items()}
        return outputs(adjoint, PARAMETERS | p | times, "step-to", "ends-and-ts")

    agree(run, dict(args=ARGS))


@pytest.mark.heavy
def test_gradient_in_times_agrees_with_finite_differences():
    """In the default scheme. No change of the times is made that would change the
    number of constant steps, so that the solve is smooth in them."""
    solver = rvx.Reversible(dfx.Heun())
    rest = PARAMETERS | TIMES

    def loss(times):
        names = dict(zip(("t0", "t1", "dt0"), times, strict=True))
        return finite_sum_of_squares(
            outputs(OURS, rest | names, saving="ends-and-ts", solver=solver)[0]
        )

    at = jnp.stack([TIMES[name] for name in ("t0", "t1", "dt0")])
    value, gradient = jax.jit(loss), jax.jit(jax.grad(loss))(at)
    h = 1e-5  # central differences: error h**2 ~ 1e-10 and round-off 1e-15/h ~ 1e-10
    for along in jnp.eye(3):
        # The ends among the saved times move with t0 and t1: none leaves the interval.
        difference = (value(at + h * along) - value(at - h * along)) / (2 * h)
        assert abs(gradient @ along - difference) <= 1e-7 * jnp.linalg.norm(gradient)


@pytest.mark.heavy
def test_no_time_at_all_has_the_gradient_of_what_is_saved_of_it():
    """With t0 == t1, and both moved together."""

    def run(adjoint, p):
        times = dict(t0=p["t"], t1=p["t"])
        saveat = dfx.SaveAt(t0=True, t1=True, ts=p["t"][None], fn=of_time)
        return outputs(adjoint, PARAMETERS | TIMES | times, saveat=saveat)

    agree(run, dict(t=jnp.array(0.4)))


@pytest.mark.heavy
@pytest.mark.parametrize("stepping", ["constant", "pid", "jump-ts"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme, stepping):
    solver = rvx.Reversible(dfx.Bosh3(), *SCHEMES[scheme])
    run = lambda adjoint, p: outputs(adjoint, p, stepping, "ends-and-ts", solver=solver)
    # By default the pair is kept at every twenty halvings, of which each doubles the
    # round-off of what is undone: 2**20 eps. Measured: up to 1.4e-11.
    bound = 2**20 * 2.2e-16 if scheme == "floating-point" else 1e-11
    agree(run, PARAMETERS | TIMES, bound, arithmetic=solver.arithmetic)


@pytest.mark.heavy
@pytest.mark.parametrize("base", ["Euler", "Tsit5", "HalfSolver-Heun", "own-midpoint"])
def test_every_kind_of_base(base):
    solver = eqx.tree_at(lambda s: s.solver, SOLVER, BASES[base])
    run = lambda adjoint, p: outputs(
        adjoint, p, "step-to", "ends-and-ts", solver=solver
    )
    agree(run, PARAMETERS | TIMES)


@pytest.mark.heavy
@pytest.mark.parametrize("stepping", ["constant", "pid"])
def test_times_of_a_controlled_equation(stepping):
    """Whose path is evaluated at the times of the steps."""
    knots = jnp.linspace(0, 1.2, 6)

    def run(adjoint, p):
        path = dfx.CubicInterpolation(
            knots, dfx.backward_hermite_coefficients(knots, p["values"])
        )
        control = dfx.ControlTerm(
            lambda t, y, a: jnp.tanh(y)[..., None] * jnp.cos(t), path
        )
        terms = dfx.MultiTerm(dfx.ODETerm(network_field), control)
        return outputs(adjoint, p, stepping, "ends-and-ts", terms=terms)

    agree(run, PARAMETERS | TIMES | dict(values=jnp.sin(jnp.arange(6.0))[:, None]))


@pytest.mark.heavy
def test_hessian_in_times_and_state():
    def hessian(adjoint):
        def loss(x):
            p = PARAMETERS | TIMES | dict(t1=x[0], dt0=x[1], y0=x[2] * Y0)
            return finite_sum_of_squares(outputs(adjoint, p)[0])

        return jax.hessian(loss)(jnp.array([1.0, 0.083, 1.0]))

    assert relative_difference(hessian(OURS), hessian(DIRECT)) <= 1e-12
