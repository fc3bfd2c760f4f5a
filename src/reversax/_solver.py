"""`Reversible`: the reversible step dressed as an ordinary Diffrax solver."""

import dataclasses
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from ._numbers.arithmetic import AbstractArithmetic, FloatingPoint
from ._numbers.fixed_point import FixedPoint
from ._numbers.schedule import MOST, Index, PerStep
from ._schemes.base import check_memory, checked_sometimes
from ._schemes.control import Time, brownian_paths
from ._schemes.coupling import AbstractCoupling, Symmetric
from ._schemes.increment import AbstractIncrement, make_increment
from ._schemes.interpolation import TwinInterpolationFactory
from ._schemes.moves import Codes
from ._schemes.own import own_scheme, undoes_itself, undoes_itself_inexactly
from ._schemes.problem import Problem, check_problem, innermost, layers_of
from ._schemes.scheme import AbstractScheme, Grid, Lost, Span
from ._schemes.twins import Twins
from ._schemes.watch import APART, Seen, Watch, begin, look
from ._xla.compat import DIVERGED, NONFINITE


def _check_base(solver: Any) -> None:
    """Refuses what no reversible scheme can be built on."""
    if not isinstance(solver, dfx.AbstractSolver):
        raise TypeError(
            "Pass a Diffrax solver, such as `diffrax.Tsit5()` (with the brackets), to "
            f"`reversax.Reversible(...)`, not {solver!r}."
        )
    call = f"`reversax.Reversible({type(solver).__name__}(...))`"
    layers = layers_of(solver)
    # By exact type: `isinstance` looks through wrappers.
    reversible = any(issubclass(type(layer), Reversible) for layer in layers)
    name = "Reversible" if reversible else type(layers[-1]).__name__
    if isinstance(solver, dfx.AbstractImplicitSolver) and not undoes_itself(solver):
        raise ValueError(
            "Use an explicit solver such as `diffrax.Tsit5()`, or keep the implicit "
            f"`{name}` with `adjoint=diffrax.RecursiveCheckpointAdjoint()`: its step "
            "solves an equation only up to a tolerance, so it cannot be undone. "
            f"({call})"
        )
    if reversible or any(map(undoes_itself, layers[1:])):
        raise ValueError(
            "Use a Runge-Kutta solver such as `diffrax.Midpoint()` or "
            f"`diffrax.Tsit5()` in this place: `{name}` advances several states (or "
            "steps) already, or undoes its own, and so has no place in another solver. "
            f"({call})"
        )


_DEFAULT_COUPLING = Symmetric()


class ReversibleState(eqx.Module):
    """The state of a [`reversax.Reversible`][] solver."""

    codes: Codes
    """The parts of the state, in their arithmetic: of twins, these two."""
    num_steps: Index
    """How many steps were accepted."""
    watch: Watch
    """What was seen on the way, and when."""
    before: Any = None
    """Where the last step began, for a scheme that looks back; else `None`."""
    grid: Grid | None = None
    """The times of all steps, for a scheme that takes equal ones; else `None`."""


class Reversible(dfx.AbstractAdaptiveSolver, dfx.AbstractWrappedSolver):
    r"""Makes any explicit one-step solver algebraically reversible.

    Use it with [`reversax.ReversibleAdjoint`][] to train through long solves: the
    backward pass re-derives the forward states instead of storing them. It is an
    ordinary Diffrax solver and works under every other adjoint too, at no advantage.
    Do not use it for stiff problems: implicit bases cannot be reversed, and see the
    coupling for damped ones.

    Nor for multi-step methods of your own: every step of the base is begun afresh, so
    one that remembers earlier steps is refused. And a step of no length must return its
    state: one that resets, clips or projects it is refused when a solve meets that.

    The order is that of the base, and one more for a base of odd order under
    [`reversax.Symmetric`][]. The interpolation is that of the base. So is the error
    estimate, under [`reversax.Symmetric`][] with what the step adds to the gap between
    the twins, which shows the parasitic mode of damped problems; it serves alone where
    the base has no estimate. A step
    costs two evaluations of the base's increment: `2*s` vector field evaluations for a
    tableau of `s` stages, and one more where the base's error estimate or its dense
    output needs a first-same-as-last stage.

    Source: McCallum & Foster, "Efficient, Accurate and Stable Gradients for Neural
    ODEs", arXiv 2410.11648, equations (4) and (5).
    """

    solver: dfx.AbstractSolver
    coupling: AbstractCoupling
    arithmetic: AbstractArithmetic
    memoryless: bool = eqx.field(static=True)

    def __init__(
        self,
        solver: dfx.AbstractSolver,
        coupling: AbstractCoupling = _DEFAULT_COUPLING,
        arithmetic: AbstractArithmetic | None = None,
        *,
        memoryless: bool = False,
    ):
        self.solver = solver
        self.memoryless = memoryless
        if undoes_itself(solver) and coupling is not _DEFAULT_COUPLING:
            raise ValueError(
                f"Leave out `coupling`: `{type(solver).__name__}` undoes itself, so "
                "that there are no twins to couple. (`reversax.Reversible(...)`)"
            )
        self.coupling = coupling
        if arithmetic is None:
            exact = getattr(coupling, "halves", False)
            exact = exact and not undoes_itself_inexactly(solver)
            arithmetic = FixedPoint() if exact else FloatingPoint()
        self.arithmetic = arithmetic

    def __check_init__(self):
        _check_arguments(self)

    @property
    def scheme(self) -> AbstractScheme:
        own = own_scheme(self.solver, self.arithmetic)
        if own is not None:
            return own
        interpolation_cls = TwinInterpolationFactory(self.solver.interpolation_cls)
        return Twins(
            coupling=self.coupling,
            arithmetic=self.arithmetic,
            interpolation_cls=interpolation_cls,
        )

    def fields(
        self, terms: PyTree[dfx.AbstractTerm], args: PyTree
    ) -> AbstractIncrement:
        """What the scheme evaluates, for these terms and arguments."""
        own = own_scheme(self.solver, self.arithmetic)
        if own is not None:
            return own.fields(terms, args)
        return make_increment(self.solver, terms, args)

    # What Diffrax asks of a solver before the first step, all answered by the base.

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def minimal_levy_area(self):
        # Only stochastic solvers have it.
        return getattr(self.solver, "minimal_levy_area")  # noqa: B009

    @property
    def scan_kind(self):
        # `DirectAdjoint` and `ForwardMode` set it on whatever counts as Runge-Kutta.
        return getattr(innermost(self.solver), "scan_kind", None)

    @property
    def interpolation_cls(self):
        return self.scheme.interpolation_cls

    def order(self, terms):
        order = self.solver.order(terms)
        if order is None or undoes_itself(self.solver):
            return order
        return self.coupling.order(order)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        if brownian_paths(terms):
            return self.solver.error_order(terms)
        order = self.solver.order(terms)
        adaptive = isinstance(self.solver, dfx.AbstractAdaptiveSolver)
        if adaptive or order is None or undoes_itself(self.solver):
            return self.solver.error_order(terms)
        return order + 2 - order % 2  # Of (E) alone.

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> ReversibleState:
        problem = terms, t0, y0, args
        check_problem(self.solver, self.coupling, problem)
        check_memory(self.solver, self.memoryless, problem)
        return _begun(self, problem, t1)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        scheme, increment = self.scheme.bare(), self.fields(terms, args)
        codes0, num_steps = (
            scheme.rebase(solver_state.codes, y0),
            solver_state.num_steps,
        )
        scheme.check_jump(codes0, made_jump)
        lost = _lost(scheme, num_steps, (t0, t1))
        options = dict(error=True, dense=True)
        span = Span(t0, t1, solver_state.before, solver_state.grid)
        step = scheme.step(increment, span, codes0, lost, **options)
        seen = Seen(scheme, codes0, step.codes, lost, t1)
        watch = look(solver_state.watch, seen)
        at = t1, scheme.reached(step.codes)
        known = increment, num_steps, watch.is_sound
        codes = checked_sometimes(step.codes, *known, at)
        # (Diffrax drops the result of a step that is rejected.)
        result = dfx.RESULTS.where(watch.is_sound, step.result, result_of(watch))
        before = t0 if scheme.looks_back else None
        codes = _checked_length(codes, solver_state, (t0, t1))
        state = ReversibleState(codes, num_steps + 1, watch, before, solver_state.grid)
        return scheme.readout(codes), step.error, step.dense_info, state, result


Reversible.__init__.__doc__ = """**Arguments:**

- `solver`: the base, any explicit one-step Diffrax solver. Runge-Kutta tableaus
    (`diffrax.Euler` and every `diffrax.AbstractERK`) take a fast path with unrolled
    stages; any other goes through its own `step`, begun afresh at each step.
    `diffrax.SemiImplicitEuler`, `diffrax.LeapfrogMidpoint`, `diffrax.ReversibleHeun`,
    [`reversax.Verlet`][] and its kin undo themselves: they are stepped as they are,
    without twins, and no bit is kept; [`reversax.SymmetricMultistep`][] keeps its
    corrections. So is a solver of your own with a method
    `backward_step(terms, t0, t1, y1, args, ts_state, solver_state, made_jump)` that
    returns `y0`, `dense_info`, `solver_state` and `result` at `t0`, as in Diffrax's
    pull request 727: `ts_state` is a tuple of one time, when the step before began.
- `coupling`: how the twins are mixed, [`reversax.Symmetric`][] by default.
- `arithmetic`: the numbers of the twins, by default [`reversax.FixedPoint`][], and
    [`reversax.FloatingPoint`][] for [`reversax.McCallumFoster`][] and for a solver with
    a `backward_step`, which allow no other.
- `memoryless`: says of a base whose `solver_state` holds arrays, which its steps read,
    that they are, up to round-off, what its `init` gives at the start of each step, as
    the last stage of the step before is. Solvers of Diffrax, and those whose steps read
    no such array, need no word.

**Raises:** `ValueError` for an implicit base, for `Reversible` itself, for a wrapper of
a solver that undoes itself, and for a coupling beside such a solver.
`TypeError` for anything that is no solver, coupling or arithmetic. `ValueError` for
`FixedPoint` with `McCallumFoster` or a solver with a `backward_step`. When a solve
begins: `TypeError` for a state that is not of floating-point arrays, `ValueError` for
`UnsafeBrownianPath`, for an Ito base on a stochastic equation, for a base whose steps
read what earlier ones left, and for a controller with jumps where a solver with a
`backward_step` carries arrays. During a solve: `equinox.EquinoxRuntimeError` for a
base of which a step of no length does not return its state.
"""


def _check_arguments(solver: Reversible) -> None:
    _check_base(solver.solver)
    for name, cls, example in (
        ("coupling", AbstractCoupling, "Symmetric"),
        ("arithmetic", AbstractArithmetic, "FixedPoint"),
    ):
        value = getattr(solver, name)
        if not isinstance(value, cls):
            raise TypeError(
                f"Pass one from reversax, such as `reversax.{example}()`, as "
                f"`reversax.Reversible(..., {name}=...)`: {value!r} is no {name}."
            )
    if solver.arithmetic.exact and undoes_itself_inexactly(solver.solver):
        raise ValueError(
            f"Leave out `arithmetic`: `{type(solver.solver).__name__}` undoes its "
            "steps by a `backward_step` of its own, in the floating-point numbers that "
            "it is written in. (`reversax.Reversible(...)`)"
        )
    if solver.arithmetic.exact and not solver.coupling.halves:
        raise ValueError(
            "Use `coupling=reversax.Symmetric()` with "
            "`arithmetic=reversax.FixedPoint(...)`, or "
            "`arithmetic=reversax.FloatingPoint()` with "
            "`coupling=reversax.McCallumFoster(...)`, the published method: each "
            "of its steps multiplies one twin by the coupling parameter, which "
            "loses a fraction of a bit that would have to be kept, and leaves a "
            "remainder. (`reversax.Reversible(...)`)"
        )


def _lost(scheme: AbstractScheme, index: Index, interval: tuple[Time, Time]) -> Lost:
    # What the number of halvings may follow from is known to the adjoint only.
    schedule = scheme.schedule(0, PerStep(MOST, 1, 0))
    return Lost(schedule.of_step(index, *interval), 0, index)


def _begun(solver: Reversible, problem: Problem, t1: Time) -> ReversibleState:
    """The state before the first step, which is to end at `t1`, of a solve that Diffrax
    drives."""
    (terms, t0, y0, args), scheme = problem, solver.scheme
    codes, zero = scheme.first(problem, t1), jnp.zeros((), jnp.int32)
    before = t0 if scheme.looks_back else None
    state = ReversibleState(codes, zero, begin(y0, t0), before)
    if not scheme.equal_steps:
        return state
    # Where the last of them ends is not known here.
    grid = Grid(t0, t1 - t0, jnp.inf)
    known = solver.fields(terms, args), Span(t0, t1, grid=grid), codes
    return dataclasses.replace(state, codes=scheme.begin(*known), grid=grid)


def _checked_length(
    codes: Codes, state: ReversibleState, interval: tuple[Time, Time]
) -> Codes:
    """The parts, which raise if steps should be of equal length and are not."""
    (t0, t1), grid = interval, state.grid
    if grid is None:
        return codes
    end = grid.begin + (state.num_steps + 1) * grid.length
    most = jnp.maximum(jnp.abs(jnp.asarray(grid.begin)), jnp.abs(jnp.asarray(t1)))
    allowed = 1e-3 * grid.length + 64 * jnp.finfo(most.dtype).eps * most
    # (Lanes of a batch that have arrived take steps of no length.)
    wrong = (t1 > t0) & (jnp.abs(t1 - end) > allowed)
    return eqx.error_if(codes, wrong, _NOT_EQUAL)


_NOT_EQUAL = (
    "Use `stepsize_controller=diffrax.ConstantStepSize()` and a `dt0` that divides "
    "`t1 - t0`, or `adjoint=reversax.ReversibleAdjoint()`, which divides that into "
    "steps as long as each other: a multistep method reads states at equal distances. "
    "(`reversax.SymmetricMultistep(...)`)"
)


def result_of(watch: Watch) -> dfx.RESULTS:
    """Of a solve of which something else than soundness was seen."""
    return dfx.RESULTS.where(watch.state == APART, DIVERGED, NONFINITE)
