"""`Reversible`: the reversible step dressed as an ordinary Diffrax solver."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._arithmetic import AbstractArithmetic, FloatingPoint
from ._coupling import AbstractCoupling, McCallumFoster, Pair
from ._increment import AbstractIncrement, State, Time, make_increment
from ._pair import (
    Scheme,
    StepEnds,
    TwinInterpolationFactory,
    dense_info,
    take_step,
)

_TWO_STATE_SOLVERS = (dfx.ReversibleHeun, dfx.LeapfrogMidpoint, dfx.SemiImplicitEuler)


def _layers(solver: Any) -> list:
    """A solver, what it wraps, what that wraps, and so on."""
    layers = [solver]
    while issubclass(type(layers[-1]), dfx.AbstractWrappedSolver):
        layers.append(layers[-1].solver)
    return layers


def _innermost(solver: dfx.AbstractSolver) -> dfx.AbstractSolver:
    return _layers(solver)[-1]


def _check_base(solver: Any) -> None:
    """Refuses what no reversible scheme can be built on."""
    if not isinstance(solver, dfx.AbstractSolver):
        raise TypeError(
            "`reversax.Reversible(solver)` needs a Diffrax solver, such as "
            f"`diffrax.Tsit5()` (with the brackets), got {solver!r}."
        )
    call = f"`reversax.Reversible({type(solver).__name__}(...))`"
    layers = _layers(solver)
    # By exact type: `isinstance` looks through wrappers.
    reversible = any(issubclass(type(layer), Reversible) for layer in layers)
    name = "Reversible" if reversible else type(layers[-1]).__name__
    if isinstance(solver, dfx.AbstractImplicitSolver):
        raise ValueError(
            f"{call} needs an explicit solver, but `{name}` is implicit: its step "
            "solves an equation only up to a tolerance, so it cannot be undone. Use an "
            "explicit one such as `diffrax.Tsit5()`, or keep the implicit solver with "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
    if reversible or isinstance(layers[-1], _TWO_STATE_SOLVERS):
        raise ValueError(
            f"{call} needs a one-step solver, but `{name}` advances two states "
            "(or two steps) already, so it has no increment of a single state. Use a "
            "Runge-Kutta solver such as `diffrax.Midpoint()` or `diffrax.Tsit5()`."
        )


def _is_brownian(x: Any) -> bool:
    return isinstance(x, dfx.AbstractBrownianPath)


def check_problem(
    solver: "Reversible", terms: PyTree[dfx.AbstractTerm], y0: State
) -> None:
    """Refuses terms and states for which the scheme would be silently wrong."""
    call = "`diffrax.diffeqsolve(..., solver=reversax.Reversible(...))`"
    for leaf in jtu.tree_leaves(y0):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{call} needs a state of real floating-point arrays, got a leaf of "
                f"dtype {dtype}. Convert integers to float; split a complex state into "
                "its real and imaginary parts."
            )
    paths = jtu.tree_leaves(terms, is_leaf=_is_brownian)
    paths = [path for path in paths if _is_brownian(path)]
    if any(isinstance(path, dfx.UnsafeBrownianPath) for path in paths):
        raise ValueError(
            f"{call} got an `UnsafeBrownianPath`, which cannot be evaluated over the "
            "same interval twice, as each reversible step and its inverse do. Use "
            "`diffrax.VirtualBrownianTree` instead."
        )
    if paths and isinstance(solver.solver, dfx.AbstractItoSolver):
        name = type(_innermost(solver.solver)).__name__
        raise ValueError(
            f"{call} got a stochastic differential equation and the base `{name}`, "
            "which converges to the Ito solution. Half of each reversible step runs "
            "backwards along the path, where an Ito scheme converges to something "
            "else, so the pair would converge to neither. Use a Stratonovich base such "
            "as `diffrax.Heun()` or `diffrax.Midpoint()`."
        )


def pair_step(
    scheme: Scheme,
    increment: AbstractIncrement,
    t0: Time,
    t1: Time,
    pair0: Pair,
    *,
    error: bool,
    dense: bool,
) -> tuple[State, State | None, dict[str, Any], Pair, dfx.RESULTS]:
    """A reversible step in the form that `diffrax.AbstractSolver.step` returns."""
    step = take_step(
        scheme,
        pair0,
        forward=lambda z: increment(t0, t1, z, error=error, dense=dense),
        backward=lambda y: increment(t1, t0, y, error=False, dense=False),
    )
    y1 = scheme.readout(step.pair1)
    ends = StepEnds(
        scheme.readout(pair0),
        y1,
        step.z,
        step.forward.increment,
        step.forward.dense_info,
    )
    ahead, behind = step.forward.result, step.backward.result
    if ahead is dfx.RESULTS.successful:
        result = behind  # Stays known at trace time wherever it is.
    else:
        result = dfx.RESULTS.where(dfx.is_okay(ahead), behind, ahead)
    return y1, step.forward.error, dense_info(ends), step.pair1, result


class Reversible(dfx.AbstractAdaptiveSolver, dfx.AbstractWrappedSolver):
    r"""Makes any explicit one-step solver algebraically reversible.

    Use it with [`reversax.ReversibleAdjoint`][] to train through long solves: the
    backward pass re-derives the forward states instead of storing them. It is an
    ordinary Diffrax solver and works under every other adjoint too, at no advantage.
    Do not use it for stiff problems: implicit bases cannot be reversed, and see the
    coupling for damped ones.

    Nor for multi-step methods: every step of the base is begun afresh, so a solver that
    remembers earlier steps is taken at its first one.

    The order, the error estimate and the interpolation are those of the base. A step
    costs two evaluations of the base's increment: `2*s` vector field evaluations for a
    tableau of `s` stages, and one more where the base's error estimate or its dense
    output needs a first-same-as-last stage.

    Source: McCallum & Foster, "Efficient, Accurate and Stable Gradients for Neural
    ODEs", arXiv 2410.11648, equations (4) and (5).
    """

    solver: dfx.AbstractSolver
    coupling: AbstractCoupling = McCallumFoster()
    arithmetic: AbstractArithmetic = FloatingPoint()

    def __check_init__(self):
        _check_base(self.solver)
        for name, cls in (
            ("coupling", AbstractCoupling),
            ("arithmetic", AbstractArithmetic),
        ):
            value = getattr(self, name)
            if not isinstance(value, cls):
                raise TypeError(
                    f"`reversax.Reversible(..., {name}=...)` got {value!r}, which is "
                    f"no {name}. Pass one from reversax, such as "
                    f"`reversax.{type(_DEFAULTS[name]).__name__}()`."
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
        return getattr(_innermost(self.solver), "scan_kind", None)

    @property
    def interpolation_cls(self):
        return TwinInterpolationFactory(self.solver.interpolation_cls)

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> Pair:
        del t0, t1, args
        check_problem(self, terms, y0)
        return self.scheme.start(y0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump  # Nothing is carried over from the previous step.
        increment = make_increment(self.solver, terms, args)
        pair0 = self.scheme.rebase(solver_state, y0)
        return pair_step(self.scheme, increment, t0, t1, pair0, error=True, dense=True)


_DEFAULTS = dict(coupling=McCallumFoster(), arithmetic=FloatingPoint())

Reversible.__init__.__doc__ = """**Arguments:**

- `solver`: the base, any explicit one-step Diffrax solver. Runge-Kutta tableaus
    (`diffrax.Euler` and every `diffrax.AbstractERK`) take a fast path with unrolled
    stages; any other goes through its own `step`, begun afresh at each step.
- `coupling`: how the twins are mixed, [`reversax.McCallumFoster`][] by default.
- `arithmetic`: the numbers of the twins, [`reversax.FloatingPoint`][] by default.

**Raises:** `ValueError` for an implicit base and for one that already advances two
states (`ReversibleHeun`, `LeapfrogMidpoint`, `SemiImplicitEuler`, `Reversible`).
`TypeError` for anything that is no solver, coupling or arithmetic. When a solve begins:
`TypeError` for a state that is not of real floating-point arrays, `ValueError` for
`UnsafeBrownianPath` and for an Ito base on a stochastic equation.
"""


class ClosedSolver(dfx.AbstractSolver):
    """The same step for the adjoint's own loop, where terms and arguments are already
    inside the increment and it is known whether error and dense output are wanted."""

    scheme: Scheme
    increment: AbstractIncrement
    base_interpolation_cls: Callable[..., dfx.AbstractLocalInterpolation] = eqx.field(
        static=True
    )
    known_error_order: Any
    error: bool = eqx.field(static=True)
    dense: bool = eqx.field(static=True)

    term_structure: ClassVar = dfx.AbstractTerm

    @property
    def interpolation_cls(self):
        return TwinInterpolationFactory(self.base_interpolation_cls)

    def error_order(self, terms):
        return self.known_error_order

    def init(self, terms, t0, t1, y0, args) -> Pair:
        return self.scheme.start(y0)

    def func(self, terms, t0, y0, args):
        raise NotImplementedError  # Only asked for before the loop begins.

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        return pair_step(
            self.scheme,
            self.increment,
            t0,
            t1,
            solver_state,
            error=self.error,
            dense=self.dense,
        )
