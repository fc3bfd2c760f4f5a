"""Solvers that say themselves how their steps are undone, by a `backward_step`.

The asynchronous leapfrog and the leapfrog undo theirs up to round-off; EES25, of
docs/extending.md, up to the sixth power of a step.
"""

import runpy
from pathlib import Path
from typing import ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from helpers import finite_sum_of_squares, relative_difference

import reversax as rvx

EXAMPLE = Path(__file__).parents[1] / "examples" / "ees25.py"
EES25 = runpy.run_path(str(EXAMPLE))["EES25"]
OURS, DIRECT = rvx.ReversibleAdjoint(), dfx.DirectAdjoint()


class Leaping(dfx.AbstractSolver):
    """What the two solvers below have in common."""

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


class AsynchronousLeapfrog(Leaping):
    """Of a state and its derivative (Mutze 2013; Zhuang et al. 2021, arXiv 2102.04668),
    which counts its steps, as Python does at first."""

    damping: jax.Array | float = 1.0

    def init(self, terms, t0, t1, y0, args):
        return terms.vf(t0, y0, args), 0

    def _across(self, terms, t0, t1, y0, args, v0):
        half = (t1 - t0) / 2
        middle = y0 + half * v0
        slope = terms.vf(t0 + half, middle, args)
        v1 = v0 + 2 * self.damping * (slope - v0)
        return middle + half * v1, v1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        v0, number = solver_state
        y1, v1 = self._across(terms, t0, t1, y0, args, v0)
        state = v1, number + 1
        return y1, None, dict(y0=y0, y1=y1), state, dfx.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        v1, number = solver_state
        half = (t1 - t0) / 2
        middle = y1 - half * v1
        slope = terms.vf(t0 + half, middle, args)
        v0 = (v1 - 2 * self.damping * slope) / (1 - 2 * self.damping)
        y0 = middle - half * v0
        state = v0, number - 1
        return y0, dict(y0=y0, y1=y1), state, dfx.RESULTS.successful


class Leapfrog(Leaping):
    """The midpoint method, which remembers where the step before began, and finds that
    again by `ts_state`."""

    def init(self, terms, t0, t1, y0, args):
        return t0, y0

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        before, y_before = solver_state
        y1 = y_before + terms.vf_prod(t0, y0, args, terms.contr(before, t1))
        return y1, None, dict(y0=y0, y1=y1), (t0, y0), dfx.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        (before,), (_, y0) = ts_state, solver_state
        y_before = y1 - terms.vf_prod(t0, y0, args, terms.contr(before, t1))
        state = before, y_before
        return y0, dict(y0=y0, y1=y1), state, dfx.RESULTS.successful


SOLVERS = {
    "EES25": EES25(),
    "ALF": AsynchronousLeapfrog(),
    "damped-ALF": AsynchronousLeapfrog(0.9),
    "leapfrog": Leapfrog(),
}
# EES25 with steps of 1/32 misses 3e-9 of the state.
BOUNDS = {"EES25": 1e-8, "ALF": 1e-12, "damped-ALF": 1e-10, "leapfrog": 1e-12}
SAVED = {
    "end": dfx.SaveAt(t1=True),
    "ts": dfx.SaveAt(ts=jnp.array([0.13, 0.5, 1.21])),
    "steps": dfx.SaveAt(t0=True, steps=3, fn=lambda t, y, args: t * jnp.sin(y * args)),
}
Y0, ARGS = jnp.array([0.3, 1.0]), jnp.array(1.3)


def field(t, y, args):
    driven = args * jnp.sin(y[::-1]) * (1 + 0.3 * jnp.cos(2 * t))
    return driven * jnp.array([1.0, -1.0])


def solve(solver, adjoint, y0, args, t1, **kwargs):
    known = dict(dt0=1 / 32, max_steps=64, adjoint=adjoint) | kwargs
    dt0 = known.pop("dt0")
    term = dfx.ODETerm(field)
    return dfx.diffeqsolve(term, solver, 0.0, t1, dt0, y0, args, **known)


def differentiated(solver, adjoint, **kwargs):
    """The loss, and its gradient by the state, the arguments and the end."""

    def loss(y0, args, t1):
        return finite_sum_of_squares(solve(solver, adjoint, y0, args, t1, **kwargs).ys)

    return eqx.filter_jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(Y0, ARGS, 1.27)


def agree(name, bound=None, adjoint=OURS, **kwargs):
    solver = SOLVERS[name]
    value, gradient = differentiated(rvx.Reversible(solver), adjoint, **kwargs)
    expected, oracle = differentiated(solver, DIRECT, **kwargs)
    assert abs(value - expected) <= 1e-13
    assert relative_difference(gradient, oracle) <= (bound or BOUNDS[name])
