"""The gradient of a problem's loss by one candidate, and by a tight reference."""

from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._problem import Problem, Refusal
from ._scan import RematerialisedScan

# What the gradient is with respect to.
_PARTS = ("terms", "y0", "args")
# A part of the gradient that is smaller than this, relative to all of it, is compared
# with this much of all of it instead.
_SMALL_PART = 1e-3

_REFERENCE_TOLERANCES = (1e-10, 1e-12)
_REFERENCE_MAX_STEPS = 2**16
# The reference must be known so much better than the candidates are asked to be.
_BETTER = 0.1


class Method(NamedTuple):
    """How to solve a problem."""

    solver: dfx.AbstractSolver
    adjoint: dfx.AbstractAdjoint | RematerialisedScan
    dt0: Any
    stepsize_controller: dfx.AbstractStepSizeController
    max_steps: int


class Gradient(NamedTuple):
    """A value and a gradient."""

    value: Any
    parts: Any
    """The gradient, a `Problem` with nothing in the place of all else."""
    num_steps: Any
    """The number of accepted steps, of a batch the mean."""


class Reference(NamedTuple):
    value: float
    parts: dict[str, np.ndarray]
    uncertainty: float
    """By how much, relatively, the gradient changed as the tolerance of the solve went
    from 1e-10 to 1e-12."""
    num_steps: float


def split(problem: Problem) -> tuple[Problem, Problem]:
    """What the gradient is with respect to, and the rest; `None`s fill either."""
    is_control = lambda x: isinstance(x, dfx.ControlTerm)

    def of_term(x):
        if not is_control(x):
            return eqx.is_inexact_array(x)
        everything = jtu.tree_map(eqx.is_inexact_array, x)
        nothing = jtu.tree_map(lambda _: False, x.control)
        return eqx.tree_at(lambda t: t.control, everything, nothing)

    which = jtu.tree_map(lambda _: False, problem)
    trained = lambda p: [getattr(p, part) for part in _PARTS]
    instead = [
        jtu.tree_map(of_term, problem.terms, is_leaf=is_control),
        jtu.tree_map(eqx.is_inexact_array, problem.y0),
        jtu.tree_map(eqx.is_inexact_array, problem.args),
    ]
    which = eqx.tree_at(trained, which, instead, is_leaf=lambda x: x is None)
    return eqx.partition(problem, which)


def _solve(problem: Problem, method: Method) -> tuple[Any, Any]:
    """What is saved, and the numbers of accepted steps."""

    def solve(y0):
        if isinstance(method.adjoint, RematerialisedScan):
            assert isinstance(method.solver, dfx.AbstractERK)
            ys = method.adjoint.solve(
                problem.terms, method.solver, y0, problem.args, problem.saveat
            )
            return ys, jnp.asarray(method.max_steps)
        solution = dfx.diffeqsolve(
            problem.terms,
            method.solver,
            problem.t0,
            problem.t1,
            method.dt0,
            y0,
            problem.args,
            saveat=problem.saveat,
            stepsize_controller=method.stepsize_controller,
            adjoint=method.adjoint,
            max_steps=method.max_steps,
        )
        return solution.ys, solution.stats["num_accepted_steps"]

    return (jax.vmap(solve) if problem.batched else solve)(problem.y0)


def gradient_of(differentiated: Problem, rest: Problem, method: Method) -> Gradient:
    """The value of the loss and its gradient, to be compiled."""

    def loss(differentiated):
        problem = eqx.combine(differentiated, rest)
        ys, num_steps = _solve(problem, method)
        value = jnp.asarray(problem.loss(ys, problem.args))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise Refusal(
                "`loss(ys, args)` must return a real scalar; it returned an array of "
                f"shape {value.shape} and dtype {value.dtype}.",
                exit_code=2,
            )
        return value, jnp.mean(num_steps)

    fn = jax.value_and_grad(loss, has_aux=True)
    (value, num_steps), gradient = fn(differentiated)
    return Gradient(value, gradient, num_steps)


def parts_of(gradient: Problem) -> dict[str, np.ndarray]:
    """Each part as one vector, in double precision."""

    def flat(tree):
        leaves = [np.ravel(np.float64(x)) for x in jtu.tree_leaves(tree)]
        return np.concatenate([np.zeros(0), *leaves])

    return {part: flat(getattr(gradient, part)) for part in _PARTS}


def gradient_error(
    parts: dict[str, np.ndarray], reference: dict[str, np.ndarray]
) -> float:
    """The largest relative error of any part, in the Euclidean norm."""
    norm = np.linalg.norm
    whole = norm([norm(x) for x in reference.values()])
    errors = [
        norm(parts[part] - expected) / max(norm(expected), _SMALL_PART * whole)
        for part, expected in reference.items()
    ]
    return float(max(errors))


def value_error(value: float, reference: float) -> float:
    difference = abs(value - reference)
    return difference / abs(reference) if reference != 0 else difference


def _in_double(problem: Problem) -> Problem:
    def leaf(x):
        is_real = eqx.is_inexact_array(x) and not jnp.iscomplexobj(x)
        return jnp.asarray(np.asarray(x, np.float64)) if is_real else x

    return jtu.tree_map(leaf, problem)


def _tight(controller: dfx.AbstractStepSizeController, tolerance):
    """A controller of that tolerance that steps to where the given one must."""
    tight = dfx.PIDController(rtol=tolerance, atol=tolerance)
    if isinstance(controller, dfx.ClipStepSizeController):
        return eqx.tree_at(lambda c: c.controller, controller, tight)
    return tight


def solve_reference(problem: Problem, tolerance: float) -> Reference:
    """The value and gradient by Dopri8, adaptive and tight, in double precision.

    **Raises:** `Refusal` if there is none that can tell errors of `tolerance`.
    """

    @eqx.filter_jit
    def run(differentiated, rest, tolerance):
        adjoint = dfx.RecursiveCheckpointAdjoint()
        controller = _tight(rest.stepsize_controller, tolerance)
        method = Method(dfx.Dopri8(), adjoint, None, controller, _REFERENCE_MAX_STEPS)
        return gradient_of(differentiated, rest, method)

    with jax.enable_x64(True):
        in_double = split(_in_double(problem))
        try:
            tolerances = map(jnp.array, _REFERENCE_TOLERANCES)
            loose, tight = (run(*in_double, x) for x in tolerances)
        except eqx.EquinoxRuntimeError as error:
            raise Refusal(
                "There is no reference to compare with: Dopri8 with a tolerance of "
                f"{_REFERENCE_TOLERANCES[-1]:g} failed within {_REFERENCE_MAX_STEPS:,} "
                f"steps. {message_of(error)} If the problem is stiff, no explicit "
                "solver is for it, reversible or not: take an implicit one, such as "
                "`diffrax.Kvaerno5()`, with `diffrax.RecursiveCheckpointAdjoint()`.",
                exit_code=1,
            ) from None
        expected, parts = parts_of(tight.parts), parts_of(loose.parts)
        value, num_steps = float(tight.value), float(tight.num_steps)
    norm = np.linalg.norm(np.concatenate(list(expected.values())))
    if not np.isfinite(norm) or norm == 0:
        raise Refusal(
            f"The gradient of the loss has the norm {norm}: there is nothing to "
            "compare. Does the loss depend on `ys`?",
            exit_code=1,
        )
    uncertainty = gradient_error(parts, expected)
    if not uncertainty <= _BETTER * tolerance:
        raise Refusal(
            f"The gradient of the reference is only known to {uncertainty:.0e}, by how "
            "much it changed when the tolerance of its solve went from "
            f"{_REFERENCE_TOLERANCES[0]:g} to {_REFERENCE_TOLERANCES[1]:g}. That is "
            f"too little to tell errors of {tolerance:.0e}. Is the problem chaotic, is "
            "its vector field not smooth (give the times of jumps to "
            "`diffrax.ClipStepSizeController`), or does it compute in single precision "
            "whatever it is given? A larger --tolerance may do.",
            exit_code=1,
        )
    return Reference(value, expected, uncertainty, num_steps)


def message_of(error: Exception) -> str:
    """What an error says, without what Equinox and JAX wrap around it."""
    text = str(error)
    for line in text.splitlines():
        _, found, message = line.partition("EquinoxRuntimeError: ")
        if found:
            return message.strip()
    return f"{type(error).__name__}: {text.strip()}"
