"""Whole programs to solve and to differentiate, drawn at random: the state, the scheme,
the controller, what is saved, dense output, the batching, the direction of time and
whether times are differentiated.

A program is printed with all its times; its numbers follow from its `seed`.
"""

import math
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from helpers import BASES, RungeKutta4
from hypothesis import strategies as st

import reversax as rvx

EPS = float(jnp.finfo(jnp.float64).eps)
WIDTH = 3


def field(t, y, args):
    """A small network of all the elements of any tree, and of time."""
    x, unravel = jax.flatten_util.ravel_pytree(y)
    hidden = jnp.tanh(args["in"] @ x + jnp.sin(args["rate"] * t))
    return unravel(args["out"] @ hidden - args["decay"] * jnp.sin(x))


def everything(t, y, args):
    return y


def elementwise(t, y, args):
    return jax.tree.map(lambda x: jnp.sin(x) * args["rate"] + t, y)


def summary(t, y, args):
    """Of another structure than the state."""
    x, _ = jax.flatten_util.ravel_pytree(y)
    return dict(total=jnp.sum(args["decay"] * x**2), time=t)


SAVED = [everything, elementwise, summary]


def is_sub_save(x):
    return isinstance(x, dfx.SubSaveAt)


class Program(eqx.Module):
    """A solve, and how to differentiate it."""

    state: Any
    """The structure of the state, and its shapes."""
    solver: rvx.Reversible
    restart_every: int | str
    t0: float
    t1: float
    steps: dict
    """What `diffeqsolve` is told of its steps."""
    saveat: dfx.SaveAt
    evaluated: np.ndarray
    """The times at which dense output is evaluated; without any there is none."""
    moves: bool
    """Whether times are differentiated too."""
    lanes: int
    """How many solves `vmap` batches; none if zero."""
    seed: int

    max_steps: ClassVar = 256

    def _repr_pretty_(self, printer, cycle):
        """How Hypothesis is to print it: with the very times."""
        del cycle
        with np.printoptions(floatmode="unique"):
            printer.text(eqx.tree_pformat(self, short_arrays=False))

    def start(self, lanes):
        """`(y0, args)`."""
        generator = np.random.default_rng(self.seed)
        normal = lambda *shape: jnp.asarray(generator.normal(size=shape))
        batch = (lanes,) if lanes else ()
        y0 = jax.tree.map(lambda leaf: normal(*batch, *leaf.shape), self.state)
        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.state))
        args = {
            "in": normal(WIDTH, size) / math.sqrt(size),
            "out": normal(size, WIDTH) / math.sqrt(WIDTH),
            "rate": normal(),
            "decay": normal(),
        }
        return y0, args

    def call(self, solve, y0, args, **kwargs):
        return solve(
            dfx.ODETerm(field),
            self.solver,
            self.t0,
            self.t1,
            y0=y0,
            args=args,
            max_steps=self.max_steps,
            **self.steps,
            **kwargs,
        )

    def solve(self, adjoint, y0, args):
        """What is saved, what dense output gives, and the statistics."""

        def run(y0):
            kwargs = dict(saveat=self.saveat, adjoint=adjoint)
            solution = self.call(dfx.diffeqsolve, y0, args, **kwargs)
            dense = None
            if len(self.evaluated):
                # (A difference, `evaluate(t0, t1)`, Diffrax has of one array only.)
                *_, last = self.evaluated
                each = jax.vmap(solution.evaluate)(self.evaluated)
                dense = each, solution.derivative(last)
            return solution.ys, dense, solution.stats

        return jax.vmap(run)(y0) if self.lanes else run(y0)

    def times(self):
        """Those that are differentiated."""
        subs = jax.tree.leaves(self.saveat.subs, is_leaf=is_sub_save)
        times = self.t0, self.t1, self.evaluated, [sub.ts for sub in subs]
        return jax.tree.map(jnp.asarray, times) if self.moves else None

    def at(self, times):
        """The same program at other times."""
        if times is None:
            return self
        t0, t1, evaluated, ts = times
        left = iter(ts)
        no_ts = lambda x: x is None
        move = lambda sub: eqx.tree_at(lambda s: s.ts, sub, next(left), is_leaf=no_ts)
        subs = jax.tree.map(move, self.saveat.subs, is_leaf=is_sub_save)
        where = lambda p: (p.t0, p.t1, p.evaluated, p.saveat.subs)
        return eqx.tree_at(where, self, (t0, t1, evaluated, subs))

    def amplification(self, num_steps):
        """By how much undoing so many steps magnifies round-off, as documented."""
        coupling = self.solver.coupling
        if self.solver.arithmetic.exact or is_multistep(self.solver):
            return 1.0
        if isinstance(coupling, rvx.McCallumFoster):
            return coupling.coupling_parameter**-num_steps
        number = coupling.halvings_per_step
        return 2.0 ** math.ceil(num_steps * (4 if number == "auto" else number))


# The state. (An empty tuple in it is more than Diffrax takes.)

leaves = st.sampled_from([(), (1,), (3,), (2, 2), (2, 1, 3), (0, 4)]).map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float64)
)


def with_some_element(tree):
    some = any(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    return tree if some else (tree, jax.ShapeDtypeStruct((2,), np.float64))


trees = st.recursive(
    leaves | st.none(),
    lambda inside: (
        st.lists(inside, max_size=2)
        | st.tuples(inside, inside)
        | st.dictionaries(st.sampled_from("abc"), inside, max_size=2)
    ),
    max_leaves=3,
)
states = (trees | st.tuples(trees, leaves, trees)).map(with_some_element)

# The solver. Those bases that take longest to compile come now and then.

CHEAP = ["Heun", "Euler", "Midpoint", "Bosh3", "own-midpoint"]
bases = st.sampled_from([*CHEAP, *CHEAP, *(x for x in BASES if x not in CHEAP)]).map(
    BASES.__getitem__
)
symmetric = st.builds(
    rvx.Symmetric, st.sampled_from(["auto", 1, 2, 3, 4, 7, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
)
published = st.builds(rvx.McCallumFoster, st.floats(0.9, 1.0))
# By default fixed point has more bits than the increments of some 20 halvings fill, so
# that those shed are zeros. With the other the last one is worth 2**-52.
fixed_point = st.sampled_from([rvx.FixedPoint(2.0**75), rvx.FixedPoint()])
solvers = st.builds(rvx.Reversible, bases, symmetric, fixed_point) | st.builds(
    rvx.Reversible, bases, symmetric | published, st.just(rvx.FloatingPoint())
)

multistep = st.builds(
    lambda base, arithmetic: rvx.Reversible(base, arithmetic=arithmetic),
    st.builds(
        rvx.SymmetricMultistep,
        st.sampled_from([4, 6]),
        st.sampled_from([None, 6, 7, 16]),
    ),
    fixed_point | st.just(rvx.FloatingPoint()),
)


def is_multistep(solver):
    return isinstance(solver.solver, rvx.SymmetricMultistep)


# Times are drawn as fractions of the interval, so that zero is `t0` and one is `t1` in
# either direction. Its *marks* are where steps may end: many other times fall on them.

equal_steps = st.integers(5, 30).map(lambda n: [k / n for k in range(n + 1)])
unequal_steps = st.lists(st.integers(1, 8), min_size=5, max_size=30).map(
    lambda lengths: [float(x) for x in np.cumsum([0, *lengths]) / sum(lengths)]
)


class Interval(eqx.Module):
    t0: float
    t1: float
    marks: list[float]
    moves: bool
    """Whether times are differentiated. A saved time where two steps meet has different
    derivatives to its two sides, and round-off decides: then there is to be none."""

    def at(self, fractions):
        # In the way of `ConstantStepSize`, for times to be equal to the bit.
        times = self.t0 + (self.t1 - self.t0) * np.asarray(fractions, float)
        return np.clip(times, min(self.t0, self.t1), max(self.t0, self.t1))

    def times(self, between=0.382, **size):
        """Some times in order, perhaps the same one twice."""
        fractions = st.sampled_from(self.marks) | st.floats(0, 1, width=16)
        if self.moves:
            fractions = st.integers(0, 999).map(lambda k: (k + between) / 1000)
        return st.lists(fractions, **size).map(lambda some: self.at(sorted(some)))


@st.composite
def intervals(draw):
    t0 = draw(st.sampled_from([0.0, -0.7, 3.0]))
    length = draw(st.floats(1, 2, width=16)) * draw(st.sampled_from([1, -1]))
    marks, moves = draw(equal_steps | unequal_steps), draw(st.booleans())
    return Interval(t0, t0 + length, marks, moves)


@st.composite
def controlled_steps(draw, interval, solver):
    """Keyword arguments for `diffeqsolve`."""
    length = interval.t1 - interval.t0
    kinds = st.sampled_from(["constant", "step-to", "pid", "clip"])
    kind = "constant" if is_multistep(solver) else draw(kinds)
    if kind == "constant":
        return dict(dt0=length / (len(interval.marks) - 1))
    if kind == "step-to":
        times = dfx.StepTo(interval.at(interval.marks))
        return dict(stepsize_controller=times, dt0=None)
    # Takes 5 to 50 steps or so, and rejects some of most bases.
    order = solver.error_order(dfx.ODETerm(field))
    if order > 6:
        # A short step has an estimate of nothing but round-off. The next one is to grow
        # by the most that it may, tenfold, and not by as much as round-off says.
        order = 3
    if isinstance(solver.solver, RungeKutta4):
        order = 2  # Of its estimate, the difference from Euler.
    digits = order + draw(st.floats(0, 0.75, width=16))
    controller = dfx.PIDController(
        rtol=10**-digits,
        atol=10**-digits,
        pcoeff=draw(st.sampled_from([0.0, 0.2])),
        icoeff=0.8,
        dtmax=abs(length) / 5,
    )
    if kind == "clip":
        # (And where steps are made to meet no time is saved.)
        some_times = st.none() | interval.times(0.755, min_size=1, max_size=4)
        controller = dfx.ClipStepSizeController(
            controller,
            step_ts=draw(some_times),
            jump_ts=draw(some_times),
            store_rejected_steps=draw(st.sampled_from([None, 16])),
        )
    # Diffrax itself begins with a short step: of a base of fifth order its estimate too
    # is round-off, which `pcoeff` hands on. `DirectAdjoint` then took steps of its own,
    # 2e-8 longer, with a gradient that differed by 5e-9.
    guesses = [] if solver.error_order(dfx.ODETerm(field)) > 4 else [None]
    dt0 = draw(st.sampled_from([length, length / 2, *guesses]))
    return dict(stepsize_controller=controller, dt0=dt0)


@st.composite
def sub_saves(draw, interval):
    t0, t1, ts = draw(st.booleans()), draw(st.booleans()), draw(interval.times())
    steps, fn = draw(st.integers(0, 4)), draw(st.sampled_from(SAVED))
    something = t0 or steps or len(ts)
    return dfx.SubSaveAt(t0=t0, t1=t1 or not something, ts=ts, steps=steps, fn=fn)


def saves(interval, dense):
    sub = sub_saves(interval)
    trees = (
        sub
        | st.tuples(sub, st.none() | sub)
        | st.dictionaries(st.sampled_from("abc"), sub, min_size=1, max_size=2)
    )
    return trees.map(lambda subs: dfx.SaveAt(subs=subs, dense=dense))


@st.composite
def programs(draw):
    interval = draw(intervals())
    # (By `t1` the steps of a multistep method have another derivative than Diffrax's,
    # whose length is that of `dt0`: ours are a share of the time.)
    solver = draw(solvers if interval.moves else solvers | multistep)
    evaluated = draw(st.just(np.zeros(0)) | interval.times(min_size=1, max_size=4))
    return Program(
        state=draw(states),
        solver=solver,
        restart_every=draw(st.just("auto") | st.integers(1, 7)),
        t0=interval.t0,
        t1=interval.t1,
        steps=draw(controlled_steps(interval, solver)),
        saveat=draw(saves(interval, len(evaluated) > 0)),
        evaluated=evaluated,
        moves=interval.moves,
        lanes=draw(st.sampled_from([0, 2])),
        seed=draw(st.integers(0, 999)),
    )
