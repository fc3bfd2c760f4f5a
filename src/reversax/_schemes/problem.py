"""What no reversible scheme can solve, or not rightly: refused when a solve begins."""

from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._numbers.arithmetic import State
from .control import Time, brownian_paths, noise_is_additive
from .coupling import AbstractCoupling, Symmetric

# The terms, `t0`, `y0` and `args`.
Problem = tuple[PyTree[dfx.AbstractTerm], Time, State, PyTree]


def layers_of(solver: Any) -> list:
    """A solver, what it wraps, what that wraps, and so on."""
    layers = [solver]
    while issubclass(type(layers[-1]), dfx.AbstractWrappedSolver):
        layers.append(layers[-1].solver)
    return layers


def innermost(solver: dfx.AbstractSolver) -> dfx.AbstractSolver:
    return layers_of(solver)[-1]


def is_of_diffrax(solver: dfx.AbstractSolver) -> bool:
    """Whether a solver, and all that it wraps, is one of Diffrax's own."""
    packages = {type(layer).__module__.split(".")[0] for layer in layers_of(solver)}
    return packages == {"diffrax"}


def has_backward_step(solver: dfx.AbstractSolver) -> bool:
    """Whether a solver says itself how its steps are undone."""
    return hasattr(type(solver), "backward_step")


def _check_state(call: str, y0: State) -> None:
    for leaf in jtu.tree_leaves(y0):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                "Convert the state to floating-point arrays, real or complex: a leaf "
                f"has dtype {dtype}. ({call})"
            )
        # Only axes of explicit type are in the type of an array.
        axes = [name for name in jax.typeof(leaf).sharding.spec if name is not None]
        if axes:
            raise ValueError(
                "Make the mesh by `jax.make_mesh(..., "
                "axis_types=(jax.sharding.AxisType.Auto,))`, or solve inside "
                "`jax.shard_map(..., check_vma=False)`: the state is laid out over the "
                f"mesh axes {axes} of explicit type, which Diffrax's loop cannot "
                f"carry. ({call})"
            )


def _check_noise(
    call: str, base: dfx.AbstractSolver, coupling: AbstractCoupling, problem: Problem
) -> None:
    """Refuses what would converge to no solution, or to one nobody asked for."""
    paths = brownian_paths(problem[0])
    if any(isinstance(path, dfx.UnsafeBrownianPath) for path in paths):
        raise ValueError(
            "Use `diffrax.VirtualBrownianTree` in the place of `UnsafeBrownianPath`, "
            "which cannot be evaluated over the same interval twice, as each "
            f"reversible step and its inverse do. ({call})"
        )
    if not paths or not isinstance(base, dfx.AbstractItoSolver):
        return
    if has_backward_step(base):  # It takes no step along the reversed path.
        return
    name = type(innermost(base)).__name__
    if type(innermost(base)) is not dfx.Euler:
        raise ValueError(
            "Write the equation in Stratonovich form, with the drift `f - g g'/2` in "
            "the place of `f`, and use `diffrax.StratonovichMilstein()`, "
            "`diffrax.Heun()`, or `diffrax.Euler()` with "
            f"`coupling=reversax.Symmetric()`: `{name}` is an Ito solver. A reversible "
            "pair solves the Stratonovich equation, since half of each of its steps "
            f"runs backwards along the path. ({call})"
        )
    if not isinstance(coupling, Symmetric) and not noise_is_additive(*problem):
        raise ValueError(
            "Use `coupling=reversax.Symmetric()`, with which `Euler` converges to the "
            "Stratonovich solution, or a Stratonovich base such as `diffrax.Heun()`: "
            "the noise depends on the state. Half of each step runs backwards along "
            "the path, where Euler converges to something else than forwards, and "
            f"`{type(coupling).__name__}` does not take the mean of the two. ({call})"
        )


def check_problem(
    base: dfx.AbstractSolver, coupling: AbstractCoupling, problem: Problem
) -> None:
    """Refuses terms and states for which the scheme would be silently wrong."""
    call = "`diffrax.diffeqsolve(..., solver=reversax.Reversible(...))`"
    _check_state(call, problem[2])
    _check_noise(call, base, coupling, problem)
