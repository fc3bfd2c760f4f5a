"""Solvers that undo themselves: no twins, nothing shed, not a bit lost.

The oracle is direct differentiation of the plain solver, whose steps are the same up to
round-off: neither of these solvers magnifies that by more than some digits here.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from helpers import in_cells, relative_difference

import reversax as rvx

OURS, DIRECT = rvx.ReversibleAdjoint(), dfx.DirectAdjoint()
SYMPLECTIC = {
    "Verlet": rvx.Verlet(),
    "Yoshida4": rvx.Yoshida4(),
    "BlanesMoan6": rvx.BlanesMoan6(),
    "KahanLi8": rvx.KahanLi8(),
}
SOLVERS = {
    "SemiImplicitEuler": dfx.SemiImplicitEuler(),
    "LeapfrogMidpoint": dfx.LeapfrogMidpoint(),
    "ReversibleHeun": dfx.ReversibleHeun(),
    **SYMPLECTIC,
}
OF_TWO = {"SemiImplicitEuler", *SYMPLECTIC}
ARITHMETICS = {"fixed-point": rvx.FixedPoint(), "floating-point": rvx.FloatingPoint()}
SAVED = {
    "end": dfx.SaveAt(t1=True),
    "ts": dfx.SaveAt(ts=jnp.array([0.13, 0.5, 1.21])),
    "steps": dfx.SaveAt(steps=3, fn=lambda t, y, args: t * jnp.sin(y[0] * args)),
}
Y0 = jnp.array([[0.3, -0.2], [1.0, 0.5]])
ARGS = jnp.array(1.3)


def force(t, q, args):
    return -args * jnp.sin(q) * (1 + 0.3 * jnp.cos(2 * t))


def velocity(t, p, args):
    return p * (1 + 0.1 * jnp.sin(t))


def terms_of(name):
    """Of one pendulum, driven, as two equations or as one."""
    if name in OF_TWO:
        return dfx.ODETerm(force), dfx.ODETerm(velocity)
    whole = lambda t, y, args: jnp.stack(
        [force(t, y[1], args), velocity(t, y[0], args)]
    )
    return dfx.ODETerm(whole)


def solve(name, arithmetic, adjoint, y0, args, t1, saveat, **kwargs):
    """With the plain solver where no arithmetic is given."""
    solver = SOLVERS[name]
    if arithmetic is not None:
        solver = rvx.Reversible(solver, arithmetic=ARITHMETICS[arithmetic])
    y0 = tuple(y0) if name in OF_TWO else y0
    known = dict(dt0=0.1, max_steps=64, adjoint=adjoint, saveat=SAVED[saveat])
    known.update(kwargs)
    dt0 = known.pop("dt0")
    return dfx.diffeqsolve(terms_of(name), solver, 0.0, t1, dt0, y0, args, **known)


def finite_sum(ys):
    return sum(
        jnp.sum(jnp.where(jnp.isfinite(x), x, 0) ** 2) for x in jax.tree.leaves(ys)
    )


def differentiated(name, arithmetic, adjoint, saveat, **kwargs):
    """The loss, and its gradient by the state, the arguments and the end of the
    solve."""

    def loss(y0, args, t1):
        return finite_sum(
            solve(name, arithmetic, adjoint, y0, args, t1, saveat, **kwargs).ys
        )

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(Y0, ARGS, 1.27)


CELLS = [(s, a, o) for s in SOLVERS for a in ARITHMETICS for o in SAVED]
DAILY = {
    ("LeapfrogMidpoint", "fixed-point", "ts"),
    ("ReversibleHeun", "fixed-point", "ts"),
    ("Yoshida4", "floating-point", "steps"),
}


@pytest.mark.parametrize("name, arithmetic, saveat", in_cells(CELLS, DAILY))
def test_gradients_are_those_of_the_plain_solver(name, arithmetic, saveat):
    value, gradient = differentiated(name, arithmetic, OURS, saveat)
    expected, oracle = differentiated(name, None, DIRECT, saveat)
    assert abs(value - expected) < 1e-13
    assert relative_difference(gradient, oracle) < 1e-12


CONTROLLERS = {
    "adaptive": dfx.PIDController(rtol=1e-3, atol=1e-3),
    "given": dfx.StepTo(ts=jnp.array([0.0, 0.1, 0.25, 0.6, 0.7, 1.27])),
}


@pytest.mark.parametrize(
    "name, controller",
    in_cells(
        [("ReversibleHeun", "adaptive"), *[(s, "given") for s in SOLVERS]],
        {("ReversibleHeun", "adaptive")},
    ),
)
def test_steps_may_differ_in_length(name, controller):
    known = dict(stepsize_controller=CONTROLLERS[controller])
    if controller == "given":
        known["dt0"] = None

    def loss(adjoint, arithmetic):
        of = lambda y0, args: finite_sum(
            solve(name, arithmetic, adjoint, y0, args, 1.27, "ts", **known).ys
        )
        return jax.jit(jax.value_and_grad(of, argnums=(0, 1)))(Y0, ARGS)

    value, gradient = loss(OURS, "fixed-point")
    expected, oracle = loss(DIRECT, None)
    # What steps a controller takes follows from the round-off of error estimates.
    assert abs(value - expected) < 1e-11
    assert relative_difference(gradient, oracle) < 1e-10


@pytest.mark.parametrize(
    "name",
    [
        x if x == "ReversibleHeun" else pytest.param(x, marks=pytest.mark.heavy)
        for x in SOLVERS
    ],
)
def test_lanes_of_their_own_lengths_share_parameters(name):
    y0s, t1s = jnp.stack([Y0, 0.5 * Y0, -Y0]), jnp.array([1.27, 2.4, 1.9])

    def loss(args, adjoint, arithmetic):
        one = lambda y0, t1: solve(name, arithmetic, adjoint, y0, args, t1, "ts").ys
        return finite_sum(jax.vmap(one)(y0s, t1s))

    gradient = jax.jit(jax.grad(lambda a: loss(a, OURS, "fixed-point")))(ARGS)
    oracle = jax.jit(jax.grad(lambda a: loss(a, DIRECT, None)))(ARGS)
    assert relative_difference(gradient, oracle) < 1e-12


def test_a_stochastic_equation_is_undone_to_the_bit():
    path = dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jax.random.key(3))

    def loss(args, solver, adjoint):
        noise = lambda t, y, args: jnp.diag(0.3 * jnp.cos(args * y))
        drift = dfx.ODETerm(lambda t, y, args: -args * jnp.sin(y))
        terms = dfx.MultiTerm(drift, dfx.ControlTerm(noise, path))
        known = dict(saveat=SAVED["end"], adjoint=adjoint)
        solution = dfx.diffeqsolve(
            terms, solver, 0.0, 1.0, 1 / 16, Y0[1], args, **known
        )
        return finite_sum(solution.ys)

    ours = rvx.Reversible(dfx.ReversibleHeun())
    gradient = jax.jit(jax.grad(lambda a: loss(a, ours, OURS)))(ARGS)
    oracle = jax.jit(jax.grad(lambda a: loss(a, dfx.ReversibleHeun(), DIRECT)))(ARGS)
    assert relative_difference(gradient, oracle) < 1e-12


@pytest.mark.heavy
@pytest.mark.parametrize("event_name", ["Verlet", "ReversibleHeun"])
def test_the_time_of_an_event_is_differentiated(event_name):
    crosses = lambda t, y, args, **kwargs: y[0][0] + 0.6
    event = dfx.Event(crosses, optx.Newton(1e-12, 1e-12))

    def time(args, adjoint, arithmetic):
        known = dict(event=event, max_steps=256)
        return solve(event_name, arithmetic, adjoint, Y0, args, 5.0, "end", **known).ts[
            -1
        ]

    gradient = jax.jit(jax.grad(lambda a: time(a, OURS, "fixed-point")))(ARGS)
    h = 1e-5
    of = jax.jit(lambda a: time(a, DIRECT, None))
    difference = (of(ARGS + h) - of(ARGS - h)) / (2 * h)
    assert abs(gradient - difference) < 1e-6 * abs(difference)


def kepler(t, q, args):
    return -q / jnp.sum(q**2) ** 1.5


ORBIT = (jnp.array([0.0, np.sqrt(1.3 / 0.7)]), jnp.array([0.7, 0.0]))
OF_KEPLER = dfx.ODETerm(kepler), dfx.ODETerm(lambda t, p, args: p)
STEPS = {
    "Verlet": (200, 400),
    "Yoshida4": (100, 200),
    "BlanesMoan6": (20, 40),
    "KahanLi8": (20, 40),
}


@pytest.mark.parametrize(
    "name",
    [
        x if x in ("Verlet", "KahanLi8") else pytest.param(x, marks=pytest.mark.heavy)
        for x in SYMPLECTIC
    ],
)
def test_the_order_is_what_it_should_be_on_an_orbit(name):
    """Of eccentricity 0.3, once around: it ends where it began."""

    def error(num):
        known = dict(max_steps=num, saveat=dfx.SaveAt(ts=jnp.array([2.0, 2 * np.pi])))
        solve = lambda: dfx.diffeqsolve(
            *(OF_KEPLER, SYMPLECTIC[name], 0.0, 2 * np.pi, 2 * np.pi / num, ORBIT),
            **known,
        )
        _, q = jax.jit(solve)().ys
        return float(jnp.abs(q[1] - ORBIT[1]).max())

    few, many = map(error, STEPS[name])
    order = SYMPLECTIC[name].order(OF_KEPLER)
    assert order - 0.1 < np.log2(few / many) < order + 0.6


def test_dense_output_has_the_order_of_the_solver_up_to_four():
    """Between the ends of steps, against a tight solve."""
    ts = jnp.linspace(0.3, 3.0, 17)

    def values(solver, num):
        solve = lambda: dfx.diffeqsolve(
            *(OF_KEPLER, solver, 0.0, 3.0, 3.0 / num, ORBIT),
            saveat=dfx.SaveAt(ts=ts),
            max_steps=num,
        )
        return jax.jit(solve)().ys[1]

    exact = values(rvx.KahanLi8(), 600)
    few, many = [
        float(jnp.abs(values(rvx.Yoshida4(), n) - exact).max()) for n in (60, 120)
    ]
    assert np.log2(few / many) > 3.8


@pytest.mark.parametrize(
    "name, num",
    [("Verlet", 20_000), pytest.param("KahanLi8", 1_000_000, marks=pytest.mark.heavy)],
)
def test_energy_stays_within_a_bound(name, num):
    energy = lambda p, q: jnp.sum(p**2) / 2 - 1 / jnp.sqrt(jnp.sum(q**2))
    saved = dfx.SaveAt(steps=num // 1000, fn=lambda t, y, args: energy(*y))
    run = lambda: dfx.diffeqsolve(
        *(OF_KEPLER, rvx.Reversible(SYMPLECTIC[name]), 0.0, 0.05 * num, 0.05, ORBIT),
        saveat=saved,
        max_steps=num,
    )
    found = jax.jit(run)().ys[:1000]
    off = np.abs(found / energy(*ORBIT) - 1)
    # No drift: the last tenth is as good as the first, but for the round-off of fields.
    assert off[-100:].max() < 1.5 * off[:100].max() + 1e-11
    assert off.max() < {"Verlet": 2e-3, "KahanLi8": 1e-10}[name]


@pytest.mark.parametrize(
    "name",
    [
        x if x == "Verlet" else pytest.param(x, marks=pytest.mark.heavy)
        for x in SYMPLECTIC
    ],
)
def test_time_is_reversed_to_the_bit(name):
    """Forward, momenta negated, forward again: the initial state (Rein & Tamayo, MNRAS
    473, 2018, section 3)."""
    solver = rvx.Reversible(SYMPLECTIC[name])
    scheme, arithmetic = solver.scheme, solver.arithmetic

    def turned(codes):
        """With the integers of the momenta negated: about zero."""
        zero = arithmetic.encode(jnp.zeros_like(ORBIT[0]))
        return arithmetic.reflect(codes[0], zero), codes[1]

    @jax.jit
    def there(state):
        solution = dfx.diffeqsolve(
            *(OF_KEPLER, solver, 0.0, 64.0, 1 / 16, scheme.readout(state.codes)),
            saveat=dfx.SaveAt(t1=True, solver_state=True),
            solver_state=state,
            max_steps=1024,
        )
        codes = turned(solution.solver_state.codes)
        return eqx.tree_at(lambda s: s.codes, state, codes)

    first = solver.init(OF_KEPLER, 0.0, 64.0, ORBIT, None)
    turn = there(first)
    again = there(turn)
    assert not jnp.array_equal(turn.codes[1].high, first.codes[1].high)
    for a, b in zip(again.codes, first.codes, strict=True):
        assert jnp.array_equal(a.high, b.high) and jnp.array_equal(a.low, b.low)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    "name",
    [x if x == "Verlet" else pytest.param(x, marks=pytest.mark.heavy) for x in SOLVERS],
)
def test_memory_does_not_depend_on_the_number_of_steps(name):
    def compiled(num):
        def loss(y0, args):
            known = dict(dt0=1 / num, max_steps=None)
            return finite_sum(
                solve(name, "fixed-point", OURS, y0, args, 1.0, "end", **known).ys
            )

        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(Y0, ARGS).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert compiled(64) == compiled(65_536)


def test_a_field_that_changes_between_the_passes_is_noticed():
    def moody(t, q, args):
        return -q + jax.pure_callback(
            lambda: np.asarray(np.random.default_rng().normal()),
            jax.ShapeDtypeStruct((), jnp.float64),
        )

    terms = dfx.ODETerm(moody), dfx.ODETerm(lambda t, p, args: p)

    def loss(y0):
        solver = rvx.Reversible(rvx.Verlet())
        return finite_sum(
            dfx.diffeqsolve(terms, solver, 0.0, 1.0, 0.25, tuple(y0), adjoint=OURS).ys
        )

    with pytest.raises(eqx.EquinoxRuntimeError, match="did not find the initial state"):
        eqx.filter_jit(jax.grad(loss))(Y0)


def test_what_these_solvers_cannot_have_is_refused():
    with pytest.raises(ValueError, match=r"Leave out `coupling`: `Verlet` undoes"):
        rvx.Reversible(rvx.Verlet(), rvx.Symmetric(1))
    path = dfx.LinearInterpolation(jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]))
    driven = dfx.ControlTerm(force, path), dfx.ODETerm(velocity)
    with pytest.raises(TypeError, match=r"two terms `diffrax\.ODETerm`"):
        dfx.diffeqsolve(driven, rvx.Verlet(), 0.0, 1.0, 0.1, tuple(Y0), ARGS)
    controller = dfx.PIDController(rtol=1e-3, atol=1e-3)
    known = dict(stepsize_controller=controller)
    with pytest.raises(RuntimeError, match="adaptive step sizes"):
        solve("Verlet", "fixed-point", OURS, Y0, ARGS, 1.0, "end", **known)
    again = dfx.SaveAt(t1=True, solver_state=True)
    solver = rvx.Reversible(dfx.LeapfrogMidpoint())
    first = dfx.diffeqsolve(
        *(terms_of("LeapfrogMidpoint"), solver, 0.0, 1.0, 0.1, Y0, ARGS),
        adjoint=OURS,
        saveat=again,
    )
    with pytest.raises(ValueError, match="Resume without the `solver_state`"):
        dfx.diffeqsolve(
            *(terms_of("LeapfrogMidpoint"), solver, 1.0, 2.0, 0.1, first.ys[-1], ARGS),
            adjoint=OURS,
            solver_state=first.solver_state,
        )


def test_a_solve_in_two_parts_is_that_in_one():
    solver = rvx.Reversible(rvx.Verlet())
    saved = dfx.SaveAt(t1=True, solver_state=True)
    terms = terms_of("Verlet")
    run = lambda t0, t1, y0, state: dfx.diffeqsolve(
        *(terms, solver, t0, t1, 1 / 16, y0, ARGS),
        saveat=saved,
        solver_state=state,
        adjoint=OURS,
    )
    first = run(0.0, 1.0, tuple(Y0), None)
    last = jax.tree.map(lambda x: x[-1], first.ys)
    second = run(1.0, 2.0, last, first.solver_state)
    whole = run(0.0, 2.0, tuple(Y0), None)
    for a, b in zip(jax.tree.leaves(second.ys), jax.tree.leaves(whole.ys), strict=True):
        assert jnp.array_equal(a, b)
