"""Solvers, controllers and problems that several test files share."""

from typing import ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.extend.core
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import reversax as rvx
from reversax._numbers.schedule import AbstractSchedule
from reversax._schemes.own import undoes_itself
from reversax._walk.setup import _schedule


class RungeKutta4(dfx.AbstractERK):
    """A user's own tableau."""

    tableau: ClassVar[dfx.ButcherTableau] = dfx.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.array([1 / 6 - 1, 1 / 3, 1 / 3, 1 / 6]),
        c=np.array([0.5, 0.5, 1.0]),
    )
    interpolation_cls: ClassVar = dfx.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


class Kutta3(dfx.AbstractERK):
    """Kutta's third-order method, with no error estimate worth the name."""

    tableau: ClassVar[dfx.ButcherTableau] = dfx.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([-1.0, 2.0])),
        b_sol=np.array([1 / 6, 2 / 3, 1 / 6]),
        b_error=np.array([1 / 6, 2 / 3 - 1, 1 / 6]),
        c=np.array([0.5, 1.0]),
    )
    interpolation_cls: ClassVar = dfx.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 3


class OwnMidpoint(dfx.AbstractSolver):
    """A user's own solver, not written as a tableau, which carries a counter."""

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return jnp.array(0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump
        halfway = t0 + (t1 - t0) / 2
        half = terms.vf_prod(t0, y0, args, terms.contr(t0, halfway))
        middle = jax.tree.map(lambda y, k: y + k, y0, half)
        full = terms.vf_prod(halfway, middle, args, terms.contr(t0, t1))
        y1 = jax.tree.map(lambda y, k: y + k, y0, full)
        dense_info = dict(y0=y0, y1=y1)
        return y1, None, dense_info, solver_state + 1, dfx.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


TABLEAU_BASES = {
    "Euler": dfx.Euler(),
    "Heun": dfx.Heun(),
    "Midpoint": dfx.Midpoint(),
    "Ralston": dfx.Ralston(),
    "Bosh3": dfx.Bosh3(),
    "Tsit5": dfx.Tsit5(),
    "Dopri5": dfx.Dopri5(),
    "Dopri8": dfx.Dopri8(),
    "own-RungeKutta4": RungeKutta4(),
}
BASES = {
    **TABLEAU_BASES,
    "HalfSolver-Heun": dfx.HalfSolver(dfx.Heun()),
    "own-midpoint": OwnMidpoint(),
}
SCHEMES = {
    "fixed-point": (rvx.Symmetric(), rvx.FixedPoint()),
    "floating-point": (rvx.Symmetric(), rvx.FloatingPoint()),
    "published": (rvx.McCallumFoster(), rvx.FloatingPoint()),
}

# In which the features of the adjoint are tested: they are the same in all, and this
# one compiles fastest. `pytest --scheme fixed-point` is to test them in the default.
FEATURES_IN = "published"


def quick(adjoint=None, arithmetic=None, *, adapts=False):
    """Keyword arguments of `jit` for a program that is to compile in half the time.

    Not for `ReversibleAdjoint` in fixed point: unoptimised and without its fusion
    emitters XLA gives a field other bits in the two passes, and the certificate raises.
    Nor for its oracle if that `adapts` its steps: by round-off it would take others.
    """
    if arithmetic is None:
        arithmetic = SCHEMES[FEATURES_IN][1]
    optimised = not jax.config.read("jax_disable_most_optimizations")
    is_ours = isinstance(adjoint, rvx.ReversibleAdjoint)
    to_the_bit = arithmetic.exact and (is_ours or adapts)
    if optimised or to_the_bit:
        return {}
    return dict(compiler_options={"xla_cpu_use_fusion_emitters": False})


def published(base, coupling_parameter=0.999):
    """The scheme of the paper."""
    return rvx.Reversible(base, rvx.McCallumFoster(coupling_parameter))


def nonuniform(t0, t1, num, dtype=None):
    """Times from `t0` to `t1` in unequal steps."""
    s = np.linspace(0, 1, num)
    return jnp.asarray(t0 + (t1 - t0) * (s + 0.1 * np.sin(3 * s) * (1 - s)), dtype)


def ids(names):
    return dict(argnames="name", argvalues=list(names))


class Scheduled(rvx.Symmetric):
    """Whose halvings are already known."""

    chosen: AbstractSchedule | None = None

    def schedule(self, start, chosen):
        return self.chosen


class SameScheme(dfx.AbstractAdjoint):
    """An adjoint of Diffrax's, which is told how many halvings `ReversibleAdjoint`
    makes at each step, where that follows from the solve: the oracle of its scheme."""

    adjoint: dfx.AbstractAdjoint

    def loop(self, *, solver, stepsize_controller, init_state, t0, t1, **problem):
        known = dict(stepsize_controller=stepsize_controller, init_state=init_state)
        coupling = getattr(solver, "coupling", None)
        couples = coupling is not None and not undoes_itself(solver.solver)
        if couples and getattr(coupling, "halvings_per_step", None) == "auto":
            state = init_state.controller_state
            schedule = _schedule(stepsize_controller, state, 0, solver, t0, t1)
            coupling = Scheduled("auto", schedule)
            solver = rvx.Reversible(solver.solver, coupling, solver.arithmetic)
        known.update(solver=solver, t0=t0, t1=t1)
        return self.adjoint.loop(**known, **problem)


def heavy(*parameters):
    """Parameters that are not daily."""
    return [pytest.param(x, marks=pytest.mark.heavy) for x in parameters]


def in_cells(cells, daily):
    """Tuples of names as parameters; what is not daily is heavy."""
    return [
        pytest.param(*c, id="-".join(c), marks=() if c in daily else pytest.mark.heavy)
        for c in cells
    ]


def flat(tree):
    """All floating-point leaves as one vector."""
    return jax.flatten_util.ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]


def relative_difference(a, b):
    """`|a - b| / |b|` over all leaves, in double precision."""
    a, b = flat(a).astype(jnp.float64), flat(b).astype(jnp.float64)
    assert jnp.linalg.norm(b) > 0, "the reference has no gradient"
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def finite_sum_of_squares(tree):
    """A loss over outputs of which those never written are infinite."""
    leaves = [x for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x)]
    return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0) ** 2) for x in leaves)


def network_field(t, y, args):
    """A small smooth network, time-dependent, rows of `y` independent."""
    w1, b1, w2 = args
    return jnp.tanh(y @ w1 + b1) @ w2 * jnp.cos(t) - 0.1 * jnp.sin(y)


def network_arguments(dtype=jnp.float64, size=3, width=4):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (size, width), (width,), (width, size)
    return tuple(
        jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)
    )


def initial_states(batch=2, size=3, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(1), (batch, size), dtype)


def program_of(fn, *args):
    """What `fn` does with such arguments, as a program."""
    return jax.make_jaxpr(fn)(*args)


def run(program, *args):
    return jax.extend.core.jaxpr_as_fun(program)(*args)
