"""Learns a potential from trajectories, and keeps the energy far beyond them.

A particle of mass one moves in the plane, in the potential of Henon and Heiles,

    V(x, y) = (x**2 + y**2)/2 + x**2 y - y**3/3.

From noisy records of positions and momenta until t = 8 two networks are trained in the
same way, by the same number of updates, from the same data:

- one for the potential. Its gradient is the force, and `reversax.Verlet` the solver;
- one for the whole vector field, of about as many parameters, by
  `reversax.Reversible(diffrax.Midpoint())`.

Then both predict, from a start that they have not seen, until t = 4000. The script
prints how far the energy is from that of the start, and draws it with the section of
Poincare (the plane x = 0, crossed to the right), on which the true orbit is a curve.

    python examples/hamiltonian.py            # a few minutes on two cores
    python examples/hamiltonian.py --quick    # hardly trained, to see that it runs

The packages it needs come with the extra `examples`.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GREY, ORANGE, label, parse_arguments, train
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure
from rich.console import Console

import reversax

STEP = 1 / 8  # Exact in binary.
NUM_TRAJECTORIES = 64
NUM_STEPS = 64  # Of training.
EACH = 4  # Steps from one record to the next.
NOISE = 0.01
LARGEST_ENERGY = 1 / 8  # From 1/6 a particle may escape.
LONG_NUM_STEPS = 32_000
ADJOINT = reversax.ReversibleAdjoint()

# Momenta and positions, of one particle or of many.
State = tuple[Float[Array, "*batch 2"], Float[Array, "*batch 2"]]


def henon_heiles(q: Float[Array, "2"]) -> Float[Array, ""]:
    x, y = q
    return (x**2 + y**2) / 2 + x**2 * y - y**3 / 3


def energy(state: State, potential: Callable = henon_heiles) -> Float[Array, "..."]:
    p, q = state
    of_each = jnp.vectorize(potential, signature="(n)->()")
    return jnp.sum(p**2, axis=-1) / 2 + of_each(q)


# --8<-- [start:models]
class Separable(eqx.Module):
    """A particle in a potential: what it is, is all there is to learn."""

    potential: Callable[[Float[Array, "2"]], Float[Array, ""]]
    solver: diffrax.AbstractSolver

    def terms(self) -> tuple[diffrax.ODETerm, diffrax.ODETerm]:
        force = jax.vmap(jax.grad(lambda q: -self.potential(q)))
        return (
            diffrax.ODETerm(lambda t, q, args: force(q)),
            diffrax.ODETerm(lambda t, p, args: p),
        )


class Plain(eqx.Module):
    """A vector field of which nothing is known."""

    network: eqx.nn.MLP
    solver: diffrax.AbstractSolver

    def terms(self) -> diffrax.ODETerm:
        def field(t, state, args):
            out = jax.vmap(self.network)(jnp.concatenate(state, axis=-1))
            return out[:, :2], out[:, 2:]

        return diffrax.ODETerm(field)


def make_models(key: PRNGKeyArray) -> dict[str, Separable | Plain]:
    keys = jax.random.split(key)
    network = lambda ins, outs, key: eqx.nn.MLP(
        ins, outs, 32, depth=2, activation=jnp.tanh, key=key
    )
    verlet = reversax.Reversible(reversax.Verlet())
    midpoint = reversax.Reversible(diffrax.Midpoint())
    return {
        "potential": Separable(network(2, "scalar", keys[0]), verlet),
        "vector field": Plain(network(4, 4, keys[1]), midpoint),
    }


def solve(model: Separable | Plain, y0: State, num_steps: int, each: int) -> State:
    """The states of all particles after every `each` steps, the first included."""
    solution = diffrax.diffeqsolve(
        model.terms(),
        model.solver,
        t0=0.0,
        t1=num_steps * STEP,
        dt0=STEP,
        y0=y0,
        saveat=diffrax.SaveAt(t0=True, steps=each),
        adjoint=ADJOINT,
        max_steps=num_steps,
    )
    assert solution.ys is not None
    return solution.ys


# --8<-- [end:models]
class Data(NamedTuple):
    start: State
    records: State
    """With noise, at multiples of `EACH` steps."""


def random_states(num: int, generator: np.random.Generator) -> State:
    """Of energies up to `LARGEST_ENERGY`, inside the triangle that holds them."""
    drawn = jnp.asarray(generator.uniform(-0.6, 0.6, (2, 100 * num, 2)))
    energies = energy((drawn[0], drawn[1]))
    p, q = drawn[:, energies < LARGEST_ENERGY][:, :num]
    return p, q


def make_data(generator: np.random.Generator) -> Data:
    start = random_states(NUM_TRAJECTORIES, generator)
    truth = Separable(henon_heiles, reversax.Reversible(reversax.BlanesMoan6()))
    path = jax.jit(lambda y0: solve(truth, y0, NUM_STEPS, EACH))(start)
    noise = lambda x: NOISE * generator.standard_normal(x.shape)
    return Data(start, jax.tree.map(lambda x: x + noise(x), path))


def fit(
    model: Separable | Plain, data: Data, steps: int, console: Console, name: str
) -> tuple[Separable | Plain, float]:
    """Returns the trained model, and the loss before the last update."""
    # Not Adam: all data are seen at once, and the gradient is exact.
    optimiser = optax.lbfgs(memory_size=20)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params):
        path = solve(eqx.combine(params, static), data.start, NUM_STEPS, EACH)
        in_p, in_q = jax.tree.map(lambda a, b: a - b, path, data.records)
        return jnp.mean(in_p**2 + in_q**2) / 2 / NOISE**2

    value_and_grad = optax.value_and_grad_from_state(loss_fn)

    @jax.jit
    def update(state, step):
        params, optimiser_state = state
        loss, gradient = value_and_grad(params, state=optimiser_state)
        known = dict(value=loss, grad=gradient, value_fn=loss_fn)
        updates, optimiser_state = optimiser.update(
            gradient, optimiser_state, params, **known
        )
        return (optax.apply_updates(params, updates), optimiser_state), loss

    state = params, optimiser.init(params)
    # Some of its numbers are of weak type, and not after a step: without this the
    # second step would be compiled anew.
    state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), state)
    (params, _), loss = train(update, state, steps, console, f"Training a {name}")
    return eqx.combine(params, static), loss


def section(path: State) -> Float[np.ndarray, "crossings 2"]:
    """`(y, p_y)` where `x = 0` is crossed to the right, between two steps on a line."""
    (_, p_y), (x, y) = (np.asarray(part)[:, 0].T for part in path)
    at = np.flatnonzero((x[:-1] < 0) & (x[1:] >= 0))
    share = x[at] / (x[at] - x[at + 1])
    return np.stack([v[at] + share * (v[at + 1] - v[at]) for v in (y, p_y)], axis=1)


def relative_errors(path: State) -> Float[np.ndarray, " times"]:
    """Of the energy, against that of the start."""
    energies = np.asarray(energy(path))[:, 0]
    return energies / energies[0] - 1


def report(models: dict, paths: dict[str, State]) -> None:
    for name, model in models.items():
        error = np.abs(relative_errors(paths[name]))
        tenth = len(error) // 10
        own = ""
        if isinstance(model, Separable):
            energies = energy(paths[name], model.potential)
            # A potential is learned up to a constant, which is no part of the scale.
            change = np.abs(energies - energies[0]) / energy(paths[name])[0]
            own = f"; of its own Hamiltonian {np.max(change):.1e}"
        print(
            f"Energy, {name}: largest relative error {error[:tenth].max():.1e} in the "
            f"first tenth of the time, {error[-tenth:].max():.1e} in the last{own}"
        )


STYLES = {"truth": GREY, "potential": BLUE, "vector field": ORANGE}


def plot(paths: dict[str, State], path: pathlib.Path) -> None:
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in STYLES.items():
        error = relative_errors(paths[name])
        times = STEP * np.arange(len(error))
        if name != "truth":
            left.plot(times, error, color=colour, label=name, linewidth=0.5)
        y, p_y = section(paths[name]).T
        size = 6 if name == "truth" else 3
        right.plot(y, p_y, ".", color=colour, label=name, markersize=size)
    left.set_xscale("log")
    left.set_xlim(STEP, None)
    left.axvline(NUM_STEPS * STEP, color="black", linestyle=":")
    label(left, "time", "relative error of the energy")
    label(right, "y", "momentum in y")
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.3 * (high - low))  # The legend has a place of its own.
    right.set_title("Where the orbit crosses x = 0")
    left.set_title("Energy of a new orbit (dotted: end of the data)")
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = parse_arguments(
        "Learn the potential of Henon and Heiles.",
        steps=400,
        quick="five updates, and a twentieth of the time predicted",
    )
    jax.config.update("jax_enable_x64", True)
    console = Console()
    steps, long_num_steps = arguments.steps, LONG_NUM_STEPS
    if arguments.quick:
        steps, long_num_steps = 5, LONG_NUM_STEPS // 20

    data = make_data(np.random.default_rng(0))
    trained = {
        name: fit(model, data, steps, console, name)
        for name, model in make_models(jax.random.key(0)).items()
    }
    models = {name: model for name, (model, _) in trained.items()}
    truth = Separable(henon_heiles, reversax.Reversible(reversax.Verlet()))
    # Of energy 1/12, of which most orbits are regular.
    new = jnp.array([[np.sqrt(1 / 6 - 0.15**2 + 2 / 3 * 0.15**3), 0.0]])
    start = new, jnp.array([[0.0, 0.15]])
    paths = {
        name: eqx.filter_jit(solve)(model, start, long_num_steps, 1)
        for name, model in {"truth": truth, **models}.items()
    }
    report(models, paths)
    plot(paths, arguments.out / "hamiltonian.png")
    losses = ", ".join(f"{name} {loss:.3f}" for name, (_, loss) in trained.items())
    print(f"Loss, in squares of the noise: {losses}; see {arguments.out}")


if __name__ == "__main__":
    main()
