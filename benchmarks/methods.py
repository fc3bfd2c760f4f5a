"""The methods in JAX that accuracy.py and matrix.py compare.

A method is a scheme, which decides how accurate the gradient is for a number of
steps, and a way to differentiate it, which decides what that costs. Gradients through
`BacksolveAdjoint` are not those of the discrete solve, so they are schemes of their
own.

The plain ones are the control: Tsit5 with its stages unrolled, in a `jax.lax.scan` over
the steps, without any of Diffrax's machinery, storing what each step needs (`stored`)
or only the states (`rematerialised`, by `jax.checkpoint` of each step).
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
from problems import Problem

import reversax

Adjoint = Callable[[int], diffrax.AbstractAdjoint]
"""Of the number of steps."""

REVERSED: Adjoint = lambda steps: reversax.ReversibleAdjoint()
CHECKPOINTED: Adjoint = lambda steps: diffrax.RecursiveCheckpointAdjoint()
CHECKPOINTED_ALL: Adjoint = lambda steps: diffrax.RecursiveCheckpointAdjoint(steps)
DIRECT: Adjoint = lambda steps: diffrax.DirectAdjoint()
BACKSOLVED: Adjoint = lambda steps: diffrax.BacksolveAdjoint()


def _multistep(*args: Any, **kwargs: Any) -> reversax.Reversible:
    return reversax.Reversible(reversax.SymmetricMultistep(*args, **kwargs))


SOLVERS: dict[str, Any] = {
    "Heun": diffrax.Heun(),
    "Tsit5": diffrax.Tsit5(),
    "Dopri8": diffrax.Dopri8(),
    "ReversibleHeun": diffrax.ReversibleHeun(),
    "Reversible(Euler)": reversax.Reversible(diffrax.Euler()),
    "Reversible(Bosh3)": reversax.Reversible(diffrax.Bosh3()),
    "Reversible(Tsit5)": reversax.Reversible(diffrax.Tsit5()),
    "published Reversible(Tsit5)": reversax.Reversible(
        diffrax.Tsit5(), coupling=reversax.McCallumFoster()
    ),
    "Reversible(SymmetricMultistep(6))": _multistep(6),
    "Reversible(SymmetricMultistep(6, correct_every=None))": _multistep(6, None),
    "Reversible(SymmetricMultistep(4))": _multistep(4),
    "Reversible(SymmetricMultistep(4, starter=Bosh3))": (
        _multistep(4, starter=diffrax.Bosh3())
    ),
}


@dataclasses.dataclass(frozen=True)
class Method:
    library: str
    solver: str
    how: str
    """To differentiate."""
    adjoint: Adjoint | None = None
    """None for the plain control."""
    adaptive: bool = False
    at_least: int = 0
    """Checkpoints: with fewer steps it is the same as keeping all."""

    @property
    def name(self) -> str:
        return f"{self.solver}{', adaptive' * self.adaptive}, {self.how}"

    @property
    def exact(self) -> bool:
        """Whether the gradient is that of the discrete solve."""
        return self.adjoint is not BACKSOLVED

    @property
    def scheme(self) -> "Method":
        """The method by which to search for a number of steps."""
        if not self.exact:
            return self
        # The exact one that takes the least time; in fixed point any is exact.
        adjoint = REVERSED if self.solver.startswith("Reversible(") else CHECKPOINTED
        return Method("", self.solver, "", adjoint, self.adaptive)


def methods_for(kind: str, full: bool = True) -> list[Method]:
    """Of a problem of this kind: all, or those that most readers will ask about."""
    main = "Heun" if kind == "SDE" else "Tsit5"
    ours = ft.partial(Method, "reversax")
    theirs = ft.partial(Method, "Diffrax")
    methods = [
        ours("Reversible(Euler)", "reversed", REVERSED),
        theirs(main, "checkpoints", CHECKPOINTED),
        theirs(main, "4 checkpoints", lambda n: _checkpoints(4), at_least=4),
        theirs(main, "all checkpoints", CHECKPOINTED_ALL),
        theirs(main, "BacksolveAdjoint", BACKSOLVED),
    ]
    if kind != "SDE":
        methods += [
            ours("Reversible(Tsit5)", "reversed", REVERSED),
            ours("Reversible(SymmetricMultistep(6))", "reversed", REVERSED),
            Method("plain JAX", main, "stored"),
            Method("plain JAX", main, "rematerialised"),
        ]
    if not full:
        return methods
    methods += [
        theirs(main, "16 checkpoints", lambda n: _checkpoints(16), at_least=16),
        theirs(main, "DirectAdjoint", DIRECT),
        theirs("ReversibleHeun", "BacksolveAdjoint", BACKSOLVED),
    ]
    if kind == "SDE":
        return methods
    return [
        *methods,
        ours("Reversible(Bosh3)", "reversed", REVERSED),
        ours("Reversible(Tsit5)", "reversed", REVERSED, adaptive=True),
        ours("published Reversible(Tsit5)", "reversed", REVERSED),
        theirs("Heun", "checkpoints", CHECKPOINTED),
        theirs(main, "checkpoints", CHECKPOINTED, adaptive=True),
    ]


def _checkpoints(number: int) -> diffrax.AbstractAdjoint:
    return diffrax.RecursiveCheckpointAdjoint(checkpoints=number)


def make_field(problem: Problem) -> Callable:
    """`f(t, y, parameters)`, of a CDE with its control's derivative multiplied in."""
    if problem.control is None:
        return ft.partial(problem.field, jnp)
    ts = jnp.linspace(0.0, problem.t1, len(problem.control))
    coefficients = diffrax.backward_hermite_coefficients(ts, problem.control)
    control = diffrax.CubicInterpolation(ts, coefficients)

    def field(t, y, parameters):
        return problem.field(jnp, t, y, parameters) @ control.derivative(t)

    return field


BROWNIAN_TOLERANCE = 2.0**-12  # One for all numbers of steps: another is another path.


def make_terms(problem: Problem, seed: int) -> Any:
    drift = diffrax.ODETerm(make_field(problem))
    noise = problem.noise
    if noise is None:
        return drift

    def diffusion(t, y, parameters):
        return lineax.DiagonalLinearOperator(noise(jnp, t, y, parameters))

    shape = jax.ShapeDtypeStruct(problem.y0.shape, problem.y0.dtype)
    tolerance, key = BROWNIAN_TOLERANCE, jax.random.key(seed)
    path = diffrax.VirtualBrownianTree(0.0, problem.t1, tolerance, shape, key)
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path))


def diffrax_solve(
    problem: Problem,
    method: Method,
    max_steps: int,
    *,
    throw: bool = True,
    seed: int = 0,
) -> Callable:
    """`solve(parameters, y0, resolution) -> (y1, steps)`: the resolution is the length
    of a step, or the tolerance of a method that adapts its steps."""
    assert method.adjoint is not None
    solver, adjoint = SOLVERS[method.solver], method.adjoint(max_steps)
    terms = make_terms(problem, seed)

    def solve(parameters, y0, resolution):
        dt0, controller = resolution, diffrax.ConstantStepSize()
        if method.adaptive:
            controller = diffrax.PIDController(rtol=resolution, atol=resolution)
            dt0 = None
        solution = diffrax.diffeqsolve(
            terms,
            solver,
            t0=0.0,
            t1=problem.t1,
            dt0=dt0,
            y0=y0,
            args=parameters,
            stepsize_controller=controller,
            max_steps=max_steps,
            adjoint=adjoint,
            throw=throw,
        )
        assert solution.ys is not None
        return solution.ys[0], solution.stats["num_steps"]

    return solve


def scan(field: Callable, solver: Any, steps: int, rematerialised: bool) -> Callable:
    """`solve(parameters, y0, dt) -> y1` by an explicit solver of Diffrax, its stages
    unrolled in a `jax.lax.scan` over the steps."""
    tableau = solver.tableau
    b = np.trim_zeros(tableau.b_sol, "b")  # A last stage may be for the error alone.
    a = [np.zeros(0), *tableau.a_lower][: len(b)]
    c = [0.0, *tableau.c][: len(b)]

    def combine(weights, ks):
        return sum(float(w) * k for w, k in zip(weights, ks, strict=True))

    def solve(parameters, y0, dt):
        def step(y, i):
            ks = []
            for a_i, c_i in zip(a, c, strict=True):
                y_i = y + dt * combine(a_i, ks) if ks else y
                ks.append(field((i + float(c_i)) * dt, y_i, parameters))
            return y + dt * combine(b, ks), None

        if rematerialised:
            # Within a scan nothing can be merged with the forward pass, so there is no
            # need to pay for preventing it.
            step = jax.checkpoint(step, prevent_cse=False)
        return jax.lax.scan(step, y0, jnp.arange(steps))[0]

    return solve


def scan_solve(problem: Problem, method: Method, steps: int) -> Callable:
    """`solve(parameters, y0, dt) -> (y1, steps)`."""
    solver, rematerialised = SOLVERS[method.solver], method.how == "rematerialised"
    solve = scan(make_field(problem), solver, steps, rematerialised)
    return lambda parameters, y0, dt: (solve(parameters, y0, dt), jnp.array(steps))


def make_solve(problem: Problem, method: Method, max_steps: int, **kwargs) -> Callable:
    if method.adjoint is None:
        return scan_solve(problem, method, max_steps)
    return diffrax_solve(problem, method, max_steps, **kwargs)


def make_loss(
    problem: Problem, method: Method, max_steps: int, vmap: bool = False, **kwargs
) -> Callable:
    """`loss(inputs, resolution) -> (value, steps)`."""
    solve = make_solve(problem, method, max_steps, **kwargs)

    def loss(inputs, resolution):
        parameters, y0 = inputs
        if vmap:
            y1, steps = jax.vmap(lambda y0: solve(parameters, y0, resolution))(y0)
            return jnp.mean(y1**2), jnp.max(steps)
        y1, steps = solve(parameters, y0, resolution)
        return jnp.mean(y1**2), steps

    return loss


def make_gradient(loss: Callable) -> Callable:
    """`gradient(inputs, resolution) -> ((value, steps), gradient)`."""
    return jax.value_and_grad(loss, has_aux=True)


def count_calls(problem: Problem, make: Callable[[Problem], Callable]) -> int:
    """How often the program that `make` makes of the problem evaluates its field."""
    calls: list[Any] = []

    def note(y):
        calls.append(None)
        return y

    # Without a side effect: what no result depends on is not run, nor counted.
    @jax.custom_jvp
    def noted(y):
        return jax.pure_callback(note, jax.ShapeDtypeStruct(y.shape, y.dtype), y)

    noted.defjvp(lambda primals, tangents: (noted(*primals), *tangents))

    def field(xp, t, y, parameters):
        return problem.field(xp, t, noted(y), parameters)

    program = make(dataclasses.replace(problem, field=field))
    # It runs once, so optimising it would not pay.
    options = {"xla_backend_optimization_level": 0}
    inputs = jax.tree.map(jnp.asarray, problem.inputs)
    jax.block_until_ready(jax.jit(program, compiler_options=options)(inputs))
    return len(calls)
