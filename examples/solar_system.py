"""Weighs Jupiter and Saturn by what they do to each other: 100,000 steps and more.

The Sun and the four outer planets move as Newton says. What is known is where the
planets were, every 400 days for 140 years, of JPL's ephemeris DE421 (data/
outer_planets.csv). What is sought are the masses of Jupiter and Saturn, and where all
four planets were at first and how fast, 26 numbers. The masses start 30 % off, the rest
at the ephemeris. The inner planets' masses are added to the Sun's, and those of Uranus
and Neptune are given.

Steps of 25/64 of a day by `reversax.Verlet`, 131,072 of them, keep the energy, and are
undone to the bit with nothing stored. Each update takes one gradient of them all, by
`reversax.ReversibleAdjoint`, and scales it as Gauss and Newton would, by the Jacobian
of a solve with much longer steps: a scaling may be coarse where a gradient may not.
Afterwards the script prints

- the masses, in units of the Sun's, beside the accepted ones;
- how far the planets are from where they began if they are sent back, with velocities
  negated, and how far the energy was from its value at the start;
- how far the gradient is from that of `diffrax.DirectAdjoint` on a short arc;
- time and memory of a gradient, against checkpoints, and memory against steps.

    python examples/solar_system.py            # a few minutes on two cores
    python examples/solar_system.py --quick    # longer steps, to see that it runs

The packages it needs come with the extra `examples`.
"""

from functools import partial
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from common import (
    Measured,
    check_gradient,
    measure,
    parse_arguments,
    show_measured,
    temporary_bytes,
    train,
)
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table
from solar_data import (
    ARC_SECONDS,
    GRAVITY,
    INNER,
    PLANETS,
    SUN_OVER_PLANET,
    Seen,
    load_seen,
)
from solar_figures import CHECKPOINTED, OURS, STORED, plot_memory, plot_orbits

import reversax

STARTS_OFF = np.array([1.3, 0.7])
NUM_STEPS = 2**17  # Of 25/64 of a day, so that all ends of steps are exact in binary.
COARSE_NUM_STEPS = 512  # Of a hundred days, for the scaling.
MEMORY_NUM_STEPS = (2**11, 2**14, 2**17, 2**20)
# Two programs sum up the same numbers in another order, over all steps.
GRADIENT_BOUND = 1e-9

VERLET = reversax.Reversible(reversax.Verlet())
REVERSED = reversax.ReversibleAdjoint()
# A double up to 32 holds multiples of 2**-48 without rounding: what is read off such a
# solve, and turned round, is all there is.
GRID = 2.0**-48
ON_A_GRID = reversax.Reversible(
    reversax.Verlet(), arithmetic=reversax.FixedPoint(largest=GRID * 2.0**127)
)


class Unknowns(NamedTuple):
    log_masses: Float[Array, "2"]
    """Of Jupiter and Saturn, in units of the Sun's."""
    positions: Float[Array, "planets 3"]
    velocities: Float[Array, "planets 3"]


def initial(unknowns: Unknowns) -> tuple[Float[Array, " bodies"], tuple]:
    """The masses of all five, and their velocities and positions about the centre of
    mass."""
    sun = jnp.array([1 + INNER])
    masses = jnp.concatenate(
        [sun, jnp.exp(unknowns.log_masses), 1 / SUN_OVER_PLANET[2:]]
    )
    about_centre = lambda of_planets: (
        jnp.pad(of_planets, ((1, 0), (0, 0)))
        - (masses[1:] @ of_planets / jnp.sum(masses))
    )
    return masses, jax.tree.map(about_centre, (unknowns.velocities, unknowns.positions))


# --8<-- [start:solve]
def acceleration(t, positions: Float[Array, "bodies 3"], masses) -> Array:
    apart = positions[None] - positions[:, None]
    # What a body does to itself is zero, whatever is said of its distance from itself.
    squared = jnp.sum(apart**2, axis=-1) + jnp.eye(len(masses))
    return GRAVITY * jnp.sum(
        masses[:, None] * apart / squared[..., None] ** 1.5, axis=1
    )


TERMS = (
    diffrax.ODETerm(acceleration),  # Of the velocities, which positions drive.
    diffrax.ODETerm(lambda t, velocities, masses: velocities),
)


def solve(
    unknowns: Unknowns,
    seen: Seen,
    num_steps: int,
    solver: diffrax.AbstractSolver = VERLET,
    adjoint: diffrax.AbstractAdjoint = REVERSED,
) -> Float[Array, "times planets 3"]:
    """Where the planets are seen from the Sun at the times of `seen`."""
    masses, y0 = initial(unknowns)
    each = num_steps // (len(seen.days) - 1)
    solution = diffrax.diffeqsolve(
        TERMS,
        solver,
        t0=0.0,
        t1=seen.days[-1],
        dt0=seen.days[-1] / num_steps,
        y0=y0,
        args=masses,
        saveat=diffrax.SaveAt(t0=True, steps=each, fn=lambda t, y, args: y[1]),
        adjoint=adjoint,
        max_steps=num_steps,
    )
    assert solution.ys is not None
    return solution.ys[:, 1:] - solution.ys[:, :1]


# --8<-- [end:solve]
# --8<-- [start:update]
def errors(unknowns: Unknowns, seen: Seen, *how) -> Float[Array, "times planets 3"]:
    """As angles seen from the Sun, in arc seconds; `how`: see `solve`."""
    distances = np.linalg.norm(seen.positions, axis=-1, keepdims=True)
    return ARC_SECONDS * (solve(unknowns, seen, *how) - seen.positions) / distances


def loss_fn(unknowns: Unknowns, seen: Seen, *how) -> Float[Array, ""]:
    """Half the mean square of the errors, of any of three directions."""
    return jnp.mean(errors(unknowns, seen, *how) ** 2) / 2


def updated(unknowns: Unknowns, seen: Seen, num_steps: int) -> tuple[Unknowns, Array]:
    """After a step of Gauss and Newton, with the loss before it."""
    flat, unflatten = ravel_pytree(unknowns)
    loss, gradient = jax.value_and_grad(loss_fn)(unknowns, seen, num_steps)
    coarse = COARSE_NUM_STEPS, reversax.BlanesMoan6(), diffrax.ForwardMode()
    jacobian = jax.jacfwd(lambda x: errors(unflatten(x), seen, *coarse).ravel())(flat)
    triangle = jnp.linalg.qr(jacobian / np.sqrt(len(jacobian)), mode="r")
    step = solve_triangular(triangle, ravel_pytree(gradient)[0], trans=1)
    return unflatten(flat - solve_triangular(triangle, step)), loss


# --8<-- [end:update]
def show_masses(unknowns: Unknowns, console: Console) -> None:
    table = Table(title="The Sun's mass over a planet's")
    for name in ("planet", "start", "found", "accepted", "error"):
        table.add_column(name, justify="right")
    found = np.exp(-np.asarray(unknowns.log_masses))
    for i, sun_over_planet in enumerate(found):
        accepted = SUN_OVER_PLANET[i]
        numbers = accepted / STARTS_OFF[i], sun_over_planet, accepted
        error = f"{100 * (accepted / sun_over_planet - 1):+.4f} %"  # Of the mass.
        table.add_row(PLANETS[i], *(f"{x:.3f}" for x in numbers), error)
    console.print(table)


def energy(y: tuple, masses: Float[Array, " bodies"]) -> Float[Array, ""]:
    velocities, positions = y
    i, j = np.triu_indices(len(masses), 1)
    distances = jnp.linalg.norm(positions[i] - positions[j], axis=-1)
    kinetic = masses @ jnp.sum(velocities**2, axis=-1) / 2
    return kinetic - GRAVITY * jnp.sum(masses[i] * masses[j] / distances)


class Turned(NamedTuple):
    """What a solve there and back shows."""

    positions: Float[np.ndarray, "times planets 3"]
    """As seen from the Sun, there."""
    energy_error: float
    """The largest, relative to the energy at the start."""
    missed: float
    """By how much it does not come back, in astronomical units (a day)."""


@partial(jax.jit, static_argnums=2)
def run(masses, y0, num_steps: int, seen: Seen):
    solution = diffrax.diffeqsolve(
        TERMS,
        ON_A_GRID,
        t0=0.0,
        t1=seen.days[-1],
        dt0=seen.days[-1] / num_steps,
        y0=y0,
        args=masses,
        saveat=diffrax.SaveAt(t0=True, steps=num_steps // (len(seen.days) - 1)),
        max_steps=num_steps,
    )
    assert solution.ys is not None
    return solution.ys


def there_and_back(unknowns: Unknowns, seen: Seen, num_steps: int) -> Turned:
    """Solves, negates the velocities, and solves again."""
    masses, y0 = initial(unknowns)
    y0 = jax.tree.map(lambda x: jnp.round(x / GRID) * GRID, y0)
    velocities, positions = run(masses, y0, num_steps, seen)
    energies = jax.vmap(energy, (0, None))((velocities, positions), masses)
    back = run(masses, (-velocities[-1], positions[-1]), num_steps, seen)
    missed = back[0][-1] + velocities[0], back[1][-1] - positions[0]
    largest = lambda x: float(jnp.max(jnp.abs(x)))
    return Turned(
        np.asarray(positions[:, 1:] - positions[:, :1]),
        largest(energies / energies[0] - 1),
        max(map(largest, missed)),
    )


def gradient_by(seen: Seen, num_steps: int, *way):
    """The loss and its gradient, as a function of the unknowns."""
    return jax.value_and_grad(lambda x: loss_fn(x, seen, num_steps, *way))


def ways_of(num_steps: int) -> dict[str, tuple]:
    """Solvers and adjoints. (Diffrax's take Verlet's method in floating point.)"""
    store = diffrax.RecursiveCheckpointAdjoint(checkpoints=num_steps)
    return {
        OURS: (VERLET, REVERSED),
        CHECKPOINTED: (reversax.Verlet(), diffrax.RecursiveCheckpointAdjoint()),
        STORED: (reversax.Verlet(), store),
    }


def measure_ways(
    unknowns: Unknowns, seen: Seen, num_steps: int, repeats: int, console: Console
) -> dict[str, Measured]:
    """Checks our gradient on a short arc, and measures that of all steps."""
    arc = 2
    short = num_steps * arc // (len(seen.days) - 1)
    ways = {
        name: gradient_by(seen.until(arc), short, VERLET, adjoint)
        for name, adjoint in ((OURS, REVERSED), ("direct", diffrax.DirectAdjoint()))
    }
    with console.status("Measuring gradients"):
        ours, direct = measure(ways, unknowns, repeats=1).values()
        check_gradient(ours, direct, short, GRADIENT_BOUND)
        ways = {
            name: gradient_by(seen, num_steps, *way)
            for name, way in ways_of(num_steps).items()
            if name != STORED
        }
        measured = measure(ways, unknowns, repeats=repeats)
    show_measured(f"A gradient of {num_steps} steps", measured, console)
    return measured


def measure_memory(
    unknowns: Unknowns,
    seen: Seen,
    all_num_steps: tuple[int, ...],
    known: dict[int, dict[str, int]],
    console: Console,
) -> dict[str, list[int]]:
    """Compiled temporary bytes for each number of steps, of which some are known;
    nothing is run."""
    table = Table(title="Temporary memory of the compiled gradient, bytes")
    table.add_column("steps", justify="right")
    columns = {name: [] for name in (OURS, CHECKPOINTED, STORED)}
    for name in columns:
        table.add_column(name, justify="right")
    with console.status("Compiling gradients"):
        for n in all_num_steps:
            for name, way in ways_of(n).items():
                gradient = jax.jit(gradient_by(seen, n, *way))
                columns[name].append(
                    known[n][name]
                    if name in known.get(n, {})
                    else temporary_bytes(gradient.lower(unknowns).compile())
                )
            row = (column[-1] for column in columns.values())
            table.add_row(f"{n:,}", *(f"{entry:,}" for entry in row))
    console.print(table)
    return columns


def main() -> None:
    arguments = parse_arguments(
        "Weigh Jupiter and Saturn.",
        steps=8,
        quick="steps of 12 days, and one measurement of memory",
    )
    jax.config.update("jax_enable_x64", True)
    console = Console()
    seen, num_steps, memory_num_steps = load_seen(), NUM_STEPS, MEMORY_NUM_STEPS
    if arguments.quick:
        num_steps, memory_num_steps = 2**12, (2**12,)

    start = Unknowns(
        jnp.log(STARTS_OFF / SUN_OVER_PLANET[:2]),
        jnp.asarray(seen.positions[0]),
        jnp.asarray(seen.velocities[0]),
    )
    update = jax.jit(lambda unknowns, step: updated(unknowns, seen, num_steps))
    found, loss = train(update, start, arguments.steps, console)
    show_masses(found, console)
    began, ended = [there_and_back(x, seen, num_steps) for x in (start, found)]
    print(
        f"Energy within {ended.energy_error:.1e} of its value at the start; sent back, "
        f"{ended.missed:.1e} astronomical units from there"
    )

    repeats = 1 if arguments.quick else 3
    measured = measure_ways(start, seen, num_steps, repeats, console)
    known = {num_steps: {name: each.bytes for name, each in measured.items()}}
    columns = measure_memory(start, seen, memory_num_steps, known, console)
    figure = arguments.out / "solar_system_orbits.png"
    plot_orbits(seen, began.positions, ended.positions, figure)
    plot_memory(memory_num_steps, columns, arguments.out / "solar_system_memory.png")
    rms = np.sqrt(2 * loss)
    print(f"Error {rms:.3f} arc seconds before the last step; see {arguments.out}")


if __name__ == "__main__":
    main()
