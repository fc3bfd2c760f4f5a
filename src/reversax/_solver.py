"""`Reversible`: the reversible step dressed as an ordinary Diffrax solver."""

import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ._numbers.arithmetic import AbstractArithmetic, FloatingPoint, State
from ._numbers.fixed_point import FixedPoint
from ._numbers.schedule import MOST, AbstractSchedule, Count, Index, PerStep
from ._schemes.base import check_memory, checked_sometimes
from ._schemes.control import Time, brownian_paths, halves_of
from ._schemes.coupling import AbstractCoupling, Pair, Symmetric
from ._schemes.fields import Psi
from ._schemes.increment import AbstractIncrement, make_increment
from ._schemes.problem import check_problem, innermost, layers_of
from ._schemes.twins import (
    Scheme,
    StepEnds,
    TwinInterpolation,
    TwinInterpolationFactory,
    dense_info,
    error_estimate,
    half_of,
    take_step,
)
from ._schemes.watch import APART, Seen, Watch, begin, look, look_sometimes
from ._xla.compat import DIVERGED, NONFINITE

_TWO_STATE_SOLVERS = (dfx.ReversibleHeun, dfx.LeapfrogMidpoint, dfx.SemiImplicitEuler)


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
    if isinstance(solver, dfx.AbstractImplicitSolver):
        raise ValueError(
            "Use an explicit solver such as `diffrax.Tsit5()`, or keep the implicit "
            f"`{name}` with `adjoint=diffrax.RecursiveCheckpointAdjoint()`: its step "
            "solves an equation only up to a tolerance, so it cannot be undone. "
            f"({call})"
        )
    if reversible or isinstance(layers[-1], _TWO_STATE_SOLVERS):
        raise ValueError(
            "Use a Runge-Kutta solver such as `diffrax.Midpoint()` or "
            f"`diffrax.Tsit5()`: `{name}` advances two states (or two steps) already, "
            f"so it has no increment of a single state. ({call})"
        )


_DEFAULT_COUPLING = Symmetric()


class TwinState(eqx.Module):
    """The state of a [`reversax.Reversible`][] solver."""

    pair: Pair
    """The twins, in their arithmetic."""
    num_steps: Index
    """How many steps were accepted."""
    watch: Watch
    """What was seen of the twins, and when."""


def pair_step(
    scheme: Scheme,
    psi: AbstractIncrement | Psi,
    interval: tuple[Time, Time],
    pair0: Pair,
    halvings: Count,
    *,
    error: bool,
    dense: bool,
) -> tuple[Pair, State | None, dict[str, Any], dfx.RESULTS]:
    """A reversible step from `pair0`, its error estimate, dense output and result."""
    t0, t1 = interval
    halves = halves_of(t0, t1, psi.contr(t0, t1))
    core = ft.partial(psi.core, extends=error or dense)
    step = take_step(scheme, pair0, halvings, halves, core)
    ahead, behind = half_of(step.core, 0), half_of(step.core, 1)
    first = half_of(halves, 0)
    advance = psi.extend(first, step.z, ahead, error=error, dense=dense)
    ends = StepEnds(
        scheme.readout(pair0),
        scheme.readout(step.pair1),
        step.z,
        ahead.increment,
        advance.dense_info,
    )
    if ahead.result is None or behind.result is None:
        result = dfx.RESULTS.successful
    else:
        result = dfx.RESULTS.where(
            dfx.is_okay(ahead.result), behind.result, ahead.result
        )
    estimate = None
    if error:
        watches_gap = scheme.coupling.watches_gap
        estimate = error_estimate(
            step.core.increment, advance.error, halvings, watches_gap
        )
    if error and scheme.arithmetic.exact:
        # A controller that adapts rejects such a step.
        estimate = jtu.tree_map(
            lambda e, y: jnp.where(jnp.isnan(y), jnp.inf, e), estimate, ends.readout1
        )
    return step.pair1, estimate, dense_info(ends), result


class Reversible(dfx.AbstractAdaptiveSolver, dfx.AbstractWrappedSolver):
    r"""Makes any explicit one-step solver algebraically reversible.

    Use it with [`reversax.ReversibleAdjoint`][] to train through long solves: the
    backward pass re-derives the forward states instead of storing them. It is an
    ordinary Diffrax solver and works under every other adjoint too, at no advantage.
    Do not use it for stiff problems: implicit bases cannot be reversed, and see the
    coupling for damped ones.

    Nor for multi-step methods: every step of the base is begun afresh, so one that
    remembers earlier steps is refused. And a step of no length must return its state:
    one that resets, clips or projects the state is refused when a solve meets that.

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
        self.coupling = coupling
        if arithmetic is None:
            halves = getattr(coupling, "halves", False)
            arithmetic = FixedPoint() if halves else FloatingPoint()
        self.arithmetic = arithmetic

    def __check_init__(self):
        _check_base(self.solver)
        for name, cls, example in (
            ("coupling", AbstractCoupling, "Symmetric"),
            ("arithmetic", AbstractArithmetic, "FixedPoint"),
        ):
            value = getattr(self, name)
            if not isinstance(value, cls):
                raise TypeError(
                    f"Pass one from reversax, such as `reversax.{example}()`, as "
                    f"`reversax.Reversible(..., {name}=...)`: {value!r} is no {name}."
                )
        if self.arithmetic.exact and not self.coupling.halves:
            raise ValueError(
                "Use `coupling=reversax.Symmetric()` with "
                "`arithmetic=reversax.FixedPoint(...)`, or "
                "`arithmetic=reversax.FloatingPoint()` with "
                "`coupling=reversax.McCallumFoster(...)`, the published method: each "
                "of its steps multiplies one twin by the coupling parameter, which "
                "loses a fraction of a bit that would have to be kept, and leaves a "
                "remainder. (`reversax.Reversible(...)`)"
            )

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.coupling, self.arithmetic)

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
        return TwinInterpolationFactory(self.solver.interpolation_cls)

    def order(self, terms):
        order = self.solver.order(terms)
        return None if order is None else self.coupling.order(order)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        if brownian_paths(terms):
            return self.solver.error_order(terms)
        order = self.solver.order(terms)
        if isinstance(self.solver, dfx.AbstractAdaptiveSolver) or order is None:
            return self.solver.error_order(terms)
        return order + 2 - order % 2  # Of (E) alone.

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> TwinState:
        del t1
        check_problem(self.solver, self.coupling, (terms, t0, y0, args))
        check_memory(self.solver, self.memoryless, (terms, t0, y0, args))
        return first_state(self.scheme, t0, y0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump  # Nothing is carried over from the previous step.
        scheme, increment = self.scheme, make_increment(self.solver, terms, args)
        pair0, num_steps = scheme.rebase(solver_state.pair, y0), solver_state.num_steps
        # What the number of halvings may follow from is known to the adjoint only.
        schedule = self.coupling.schedule(0, PerStep(MOST, 1, 0))
        halvings = schedule.of_step(num_steps, t0, t1)
        options = dict(error=True, dense=True)
        pair, error, dense_info, result = pair_step(
            scheme, increment, (t0, t1), pair0, halvings, **options
        )
        seen = Seen(scheme, pair0, pair, halvings, t1)
        watch = look(solver_state.watch, seen)
        at = t1, scheme.decode(pair).z
        known = increment, num_steps, watch.is_sound
        pair = checked_sometimes(pair, *known, at)
        # (Diffrax drops the result of a step that is rejected.)
        result = dfx.RESULTS.where(watch.is_sound, result, result_of(watch))
        state = TwinState(pair, num_steps + 1, watch)
        return scheme.readout(pair), error, dense_info, state, result


Reversible.__init__.__doc__ = """**Arguments:**

- `solver`: the base, any explicit one-step Diffrax solver. Runge-Kutta tableaus
    (`diffrax.Euler` and every `diffrax.AbstractERK`) take a fast path with unrolled
    stages; any other goes through its own `step`, begun afresh at each step.
- `coupling`: how the twins are mixed, [`reversax.Symmetric`][] by default.
- `arithmetic`: the numbers of the twins, by default [`reversax.FixedPoint`][], and
    [`reversax.FloatingPoint`][] for [`reversax.McCallumFoster`][], which allows no
    other.
- `memoryless`: says of a base whose `solver_state` holds arrays, which its steps read,
    that they are, up to round-off, what its `init` gives at the start of each step, as
    the last stage of the step before is. Solvers of Diffrax, and those whose steps read
    no such array, need no word.

**Raises:** `ValueError` for an implicit base and for one that already advances two
states (`ReversibleHeun`, `LeapfrogMidpoint`, `SemiImplicitEuler`, `Reversible`).
`TypeError` for anything that is no solver, coupling or arithmetic. `ValueError` for
`FixedPoint` with `McCallumFoster`. When a solve begins:
`TypeError` for a state that is not of floating-point arrays, `ValueError` for
`UnsafeBrownianPath`, for an Ito base on a stochastic equation, and for a base whose
steps read what earlier ones left. During a solve: `equinox.EquinoxRuntimeError` for a
base of which a step of no length does not return its state.
"""


def first_state(scheme: Scheme, t0: Time, y0: State) -> TwinState:
    return TwinState(scheme.start(y0), jnp.zeros((), jnp.int32), begin(y0, t0))


def result_of(watch: Watch) -> dfx.RESULTS:
    """Of a solve of which something else than soundness was seen."""
    return dfx.RESULTS.where(watch.state == APART, DIVERGED, NONFINITE)


class Interpolated(eqx.Module):
    """A value between the ends of a step, in the place of a pair at an end."""

    y: State


class ClosedInterpolation(TwinInterpolation):
    """`TwinInterpolation` in a loop whose state is the pair."""

    def evaluate(self, t0, t1=None, left: bool = True) -> Any:
        return Interpolated(super().evaluate(t0, t1, left))


class Progress(eqx.Module):
    """How far a solve has come, in the adjoint's own loop."""

    num_steps: Index
    """How many steps were accepted, of this solve."""
    watch: Watch


class ClosedSolver(dfx.AbstractSolver):
    """The same step for the adjoint's own loop, where terms and arguments are already
    inside the increment and it is known whether error and dense output are wanted.

    The loop's state is the pair, and the solver's a [`Progress`][].
    """

    scheme: Scheme
    psi: Psi
    schedule: AbstractSchedule
    look_every: Any
    """At every how many steps to look at the twins: a Python number, or an array."""
    end: Time
    """Of the last step."""
    base_interpolation_cls: Callable[..., dfx.AbstractLocalInterpolation] = eqx.field(
        static=True
    )
    known_error_order: Any

    term_structure: ClassVar = dfx.AbstractTerm

    @property
    def interpolation_cls(self):
        return TwinInterpolationFactory(
            self.base_interpolation_cls, ClosedInterpolation
        )

    def error_order(self, terms):
        return self.known_error_order

    def init(self, terms, t0, t1, y0, args):
        raise NotImplementedError  # Done before the loop begins.

    def func(self, terms, t0, y0, args):
        raise NotImplementedError  # Only asked for before the loop begins.

    @eqx.filter_jit  # Traced once for all that Diffrax's loop traces it for.
    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        index = solver_state.num_steps
        halvings = self.schedule.of_step(index, t0, t1)
        pair, error, dense_info, result = pair_step(
            self.scheme,
            self.psi,
            (t0, t1),
            y0,
            halvings,
            error=self.psi.error,
            dense=self.psi.dense,
        )
        seen = Seen(self.scheme, y0, pair, halvings, t1)
        known = index, self.look_every, self.end
        watch = look_sometimes(solver_state.watch, *known, seen)
        return pair, error, dense_info, Progress(index + 1, watch), result
