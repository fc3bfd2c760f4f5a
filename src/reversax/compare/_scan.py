"""The control: a plain Runge-Kutta method as a rematerialised scan.

It is what one would write by hand, without the machinery of a solver library: the
stages unrolled, in a `jax.lax.scan` over constant steps, of which each is a
`jax.checkpoint`. So what is kept for the way back is the state before each step.
"""

from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree


class Plan(NamedTuple):
    """Which step saves what, known before it is compiled."""

    t0: float
    dt: float
    num_steps: int
    times: list[np.ndarray]
    """Of each `SubSaveAt`."""
    rows: np.ndarray
    """Of what is saved, those that each step writes; out of bounds where there are
    none."""
    times_of_rows: np.ndarray
    last_rows: np.ndarray
    """Those that hold the final state."""

    @property
    def num_saved(self) -> int:
        return sum(map(len, self.times))


def subs_of(saveat: dfx.SaveAt) -> list[dfx.SubSaveAt]:
    is_sub = lambda x: isinstance(x, dfx.SubSaveAt)
    return [x for x in jtu.tree_leaves(saveat.subs, is_leaf=is_sub) if is_sub(x)]


def make_plan(saveat: dfx.SaveAt, t0: Any, t1: Any, num_steps: int) -> Plan:
    t0, t1 = float(t0), float(t1)

    def times_of(sub):
        ts = [] if sub.ts is None else np.asarray(sub.ts, np.float64)
        return np.concatenate([[t0] * sub.t0, ts, [t1] * sub.t1])

    times = [times_of(sub) for sub in subs_of(saveat)]
    every = np.concatenate(times)
    share = (every - t0) / (t1 - t0)
    step = np.clip(np.ceil(share * num_steps) - 1, 0, num_steps - 1).astype(int)
    of_step = [np.flatnonzero((step == i) & (share != 1)) for i in range(num_steps)]
    most = max(map(len, of_step))
    # Each another one, so that the rows of a step are all different.
    rows = np.tile(len(every) + np.arange(most), (num_steps, 1))
    times_of_rows = np.full((num_steps, most), t0)
    for i, own in enumerate(of_step):
        rows[i, : len(own)] = own
        times_of_rows[i, : len(own)] = every[own]
    last_rows = np.flatnonzero(share == 1)
    dt = (t1 - t0) / num_steps
    return Plan(t0, dt, num_steps, times, rows, times_of_rows, last_rows)


class RematerialisedScan(eqx.Module):
    """How the control is differentiated, in the place of an adjoint of Diffrax. Its
    solver is `diffrax.Tsit5()`."""

    plan: Plan | None = None

    def __repr__(self) -> str:
        return "RematerialisedScan()"

    def solve(
        self,
        terms: PyTree[dfx.AbstractTerm],
        solver: dfx.AbstractERK,
        y0: PyTree[Array],
        args: PyTree,
        saveat: dfx.SaveAt,
    ) -> PyTree[Array]:
        """What `diffrax.diffeqsolve` would return as `solution.ys`."""
        plan = self.plan
        assert plan is not None
        dtype = jnp.result_type(*jtu.tree_leaves(y0))
        one = _Step(terms, solver, args, plan)
        step = jax.checkpoint(lambda y, x: one.take(y, x), prevent_cse=False)
        write = lambda rows: (
            lambda saved, ys: saved.at[rows].set(ys, mode="drop", unique_indices=True)
        )

        def body(carry, x):
            y, saved = carry
            y, ys = step(y, x)
            return (y, jtu.tree_map(write(x[1]), saved, ys)), None

        rows_of = lambda x: jnp.zeros((plan.num_saved, *x.shape), x.dtype)
        saved = jtu.tree_map(rows_of, y0)
        ts = jnp.asarray(plan.t0 + plan.dt * np.arange(plan.num_steps), dtype)
        xs = ts, jnp.asarray(plan.rows), jnp.asarray(plan.times_of_rows, dtype)
        (y1, saved), _ = lax.scan(body, (y0, saved), xs)
        last = lambda saved, y: saved.at[plan.last_rows].set(y)
        return _outputs(plan, saveat, jtu.tree_map(last, saved, y1), args, dtype)


def _moved(y: PyTree, weights: Any, ks: list) -> PyTree:
    leaf = lambda y, *ks: (
        y + sum(float(w) * k for w, k in zip(weights, ks, strict=True))
    )
    return jtu.tree_map(leaf, y, *ks)


class _Step(NamedTuple):
    terms: Any
    solver: dfx.AbstractERK
    args: PyTree
    plan: Plan

    def take(self, y, x):
        """The state after the step, and those at the times that it saves."""
        t, rows, times = x
        # A last stage is for the error alone, or for what is saved within the step.
        b = np.trim_zeros(self.solver.tableau.b_sol, "b")  # pyright: ignore
        ks = self.stages(t, y, [], len(b))
        y1 = _moved(y, b, ks)
        like = lambda x: jnp.zeros((len(times), *x.shape), x.dtype)
        nothing = lambda: jtu.tree_map(like, y)
        if len(times) == 0:
            return y1, nothing()
        between = lambda: self.between(t, y, y1, ks, times)
        return y1, lax.cond(rows[0] < self.plan.num_saved, between, nothing)

    def stages(self, t, y, ks, number):
        """So many, of which `ks` are the first."""
        tableau: Any = self.solver.tableau
        lower, nodes = [np.zeros(0), *tableau.a_lower], [0.0, *tableau.c]
        control = self.terms.contr(t, t + self.plan.dt)
        for i in range(len(ks), number):
            at = t + float(nodes[i]) * self.plan.dt
            y_i = _moved(y, lower[i], ks) if ks else y
            ks = [*ks, self.terms.vf_prod(at, y_i, self.args, control)]
        return ks

    def between(self, t, y, y1, ks, times):
        tableau: Any = self.solver.tableau
        every = self.stages(t, y, ks, len(tableau.b_sol))
        k = jtu.tree_map(lambda *ks: jnp.stack(ks), *every)
        t1 = t + self.plan.dt
        path = self.solver.interpolation_cls(t0=t, t1=t1, y0=y, y1=y1, k=k)
        return jax.vmap(path.evaluate)(times)


def _outputs(
    plan: Plan, saveat: dfx.SaveAt, saved: PyTree, args: PyTree, dtype: Any
) -> PyTree[Array]:
    is_sub = lambda x: isinstance(x, dfx.SubSaveAt)
    outputs, start = [], 0
    for sub, times in zip(subs_of(saveat), plan.times, strict=True):
        own = slice(start, start + len(times))
        start = own.stop
        ys = jtu.tree_map(lambda x, own=own: x[own], saved)
        at = jax.vmap(lambda t, y, fn=sub.fn: fn(t, y, args))
        outputs.append(at(jnp.asarray(times, dtype), ys))
    structure = jtu.tree_structure(saveat.subs, is_leaf=is_sub)
    return jtu.tree_unflatten(structure, outputs)
