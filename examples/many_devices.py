"""A neural ODE trained over many devices, and one large state laid out over them.

Two uses of many devices, on JAX's own runtime, `jax.sharding`:

- *Data-parallel training.* A network learns a damped Duffing oscillator from its paths.
  Each device solves its part of the batch, and the gradients are added. This can be
  left to the compiler (`jax.jit` of inputs that are laid out over devices), which adds
  them up in every step of the way back, or be said by hand (`jax.shard_map` with
  `jax.lax.psum`), which adds them once.
- *One large state.* Gray and Scott's equation on a periodic grid, its rows laid out
  over the devices, which exchange the rows at their borders at each step.

In both, the gradient is the one of a single device, undoing the solve returns the
initial state to the bit, and each device takes its share of the memory.

Where there is one device, the script makes eight virtual ones of the CPU. They share
its cores: on two cores eight of them are **not faster** than one, and wait for each
other besides. The times in the table are there to show it. Where there are several
devices, such as GPUs, it takes those. (Checked on CPU only.)

    python examples/many_devices.py            # some minutes on two cores
    python examples/many_devices.py --quick    # small, hardly trained

Two processes, each with its own devices, as on two hosts. The second prints nothing:

    python examples/many_devices.py --coordinator 127.0.0.1:9911 --process 0 &
    python examples/many_devices.py --coordinator 127.0.0.1:9911 --process 1

The packages it needs come with the extra `examples`.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, ORANGE, label, parse_arguments, temporary_bytes, train
from gray_scott import TRUE, initial_state
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import reversax

NUM_VIRTUAL_DEVICES = 8
# Of sums over devices in another order, in single precision.
GRADIENT_BOUND = 1e-4
AXIS = "devices"


class Setting(NamedTuple):
    batch: int
    width: int
    training_steps: int
    """Of the solver, for each path."""
    grid: int
    num_steps: tuple[int, ...]
    """Where the memory of the large state is measured; the gradient is of the first."""


FULL = Setting(1024, 32, 200, 256, (256, 1024, 4096))
QUICK = Setting(64, 8, 40, 64, (64,))


def set_up_devices(arguments: argparse.Namespace) -> None:
    """Before anything is computed: the processes that there are, and virtual devices
    unless the environment asks for some."""
    num_processes = 1 if arguments.coordinator is None else 2
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        num_devices = NUM_VIRTUAL_DEVICES // num_processes
        jax.config.update("jax_num_cpu_devices", num_devices)
    if num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            arguments.coordinator, num_processes, arguments.process
        )


def over(mesh: Mesh, spec: P, tree: Any) -> Any:
    """Lays arrays out over a mesh. Each process only touches its own part of them."""

    def leaf(x):
        x = np.asarray(x)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(leaf, tree)


def duffing(t, y, args):
    position, velocity = y
    return jnp.stack([velocity, position - position**3 - 0.2 * velocity])


def solve(field, y0, t1, num_steps, **options) -> diffrax.Solution:
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        reversax.Reversible(diffrax.Euler()),
        *(0.0, t1, t1 / num_steps, y0),
        adjoint=reversax.ReversibleAdjoint(),
        max_steps=num_steps,
        **options,
    )


T1 = 4.0
TS = np.linspace(0.0, T1, 9, dtype=np.float32)[1:]


def path_of(field, y0, num_steps: int) -> Float[Array, "times 2"]:
    saveat = diffrax.SaveAt(ts=jnp.asarray(TS))
    ys = solve(field, y0, T1, num_steps, saveat=saveat).ys
    assert ys is not None
    return ys


def field_of(network: eqx.nn.MLP) -> Callable:
    return lambda t, y, args: network(y)


def mean_squared_error(parameters, static, y0, paths, size: int, num_steps: int):
    """The part of these paths in the mean over `size` of them."""
    field = field_of(eqx.combine(parameters, static))
    found = jax.vmap(lambda y0: path_of(field, y0, num_steps))(y0)
    return jnp.sum((found - paths) ** 2) / (2 * len(TS) * size)


def by_hand(value_and_grad: Callable, mesh: Mesh) -> Callable:
    """Each device takes the gradient of its own part, and these are added."""

    def of_part(parameters, y0, paths):
        return jax.lax.psum(value_and_grad(parameters, y0, paths), AXIS)

    # Not checked, since Diffrax's loop does not say what varies over devices.
    return jax.shard_map(
        of_part,
        mesh=mesh,
        in_specs=(P(), P(AXIS), P(AXIS)),
        out_specs=P(),
        check_vma=False,
    )


class Row(NamedTuple):
    """A way to a gradient, as measured."""

    way: str
    gradient: Any
    round_trip: float
    bytes: int
    """Of each device."""
    sent: int
    """How many times the program has devices send something, loops counted once."""
    seconds: float


def measure(way: str, run: Callable, inputs: tuple, round_trip: float) -> Row:
    program = jax.jit(run).lower(*inputs).compile()
    _, gradient = jax.block_until_ready(program(*inputs))  # Also connects the devices.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        seconds.append(time.perf_counter() - start)
    words = ("all-reduce(", "all-gather(", "collective-permute(", "all-to-all(")
    text = program.as_text()
    assert text is not None
    sent = sum(text.count(word) for word in words)
    gradient = jax.flatten_util.ravel_pytree(jax.device_get(gradient))[0]
    sizes = temporary_bytes(program), sent, statistics.median(seconds)
    return Row(way, gradient, round_trip, *sizes)


def show(title: str, rows: list[Row], console: Console) -> None:
    """Prints the rows, and checks them against the first, of one device."""
    table = Table(title=title)
    columns = ("", "differs by", "round trip", "bytes each", "sends", "seconds")
    for name in columns:
        table.add_column(name, justify="left" if name == "" else "right")
    reference = rows[0].gradient
    worst = 0.0
    for row in rows:
        difference = float(
            jnp.linalg.norm(row.gradient - reference) / jnp.linalg.norm(reference)
        )
        worst = max(worst, difference)
        numbers = f"{row.bytes:,}", f"{row.sent}", f"{row.seconds:.3f}"
        table.add_row(row.way, f"{difference:.1e}", f"{row.round_trip:.1e}", *numbers)
    console.print(table)
    console.print(
        f"Gradient: relative difference {worst:.1e} (bound {GRADIENT_BOUND:g})"
    )
    if not worst <= GRADIENT_BOUND:
        raise RuntimeError("The gradient over many devices is not that of one.")


def round_trip_of(field, y0, t1: float, num_steps: int, vmap: bool) -> float:
    """The largest error of undoing the solve, over all elements."""

    def error(y0):
        solver = reversax.Reversible(diffrax.Euler())
        times = 0.0, t1, t1 / num_steps
        term = diffrax.ODETerm(field)
        found = reversax.round_trip_error(
            term, solver, *times, y0, max_steps=num_steps
        ).error
        return jnp.maximum(jnp.max(jnp.abs(found.y)), jnp.max(jnp.abs(found.z)))

    run = jax.vmap(error) if vmap else error
    return float(jax.jit(lambda y0: jnp.max(run(y0)))(y0))


def train_in_parallel(
    setting: Setting, steps: int, mesh: Mesh, console: Console
) -> list[float]:
    """Trains, prints the table, and returns the losses."""
    key_network, key_start = jax.random.split(jax.random.key(0))
    shape = (2, 2, setting.width, 2)
    network = eqx.nn.MLP(*shape, activation=jnp.tanh, key=key_network)
    parameters, static = eqx.partition(network, eqx.is_array)
    y0 = jax.random.uniform(key_start, (setting.batch, 2), minval=-1.5, maxval=1.5)
    paths = jax.jit(jax.vmap(lambda y0: path_of(duffing, y0, 400)))(y0)
    loss = lambda parameters, y0, paths: mean_squared_error(
        parameters, static, y0, paths, setting.batch, setting.training_steps
    )
    value_and_grad = jax.value_and_grad(loss)
    alone = parameters, y0, paths
    data = over(mesh, P(AXIS), (y0, paths))
    laid_out = over(mesh, P(), parameters), *data
    in_parts = by_hand(value_and_grad, mesh)

    field, how_many = field_of(network), f"{mesh.size} devices"
    check = lambda y0: round_trip_of(field, y0, T1, setting.training_steps, True)
    there, everywhere = check(y0), check(data[0])
    rows = [
        measure("one device", value_and_grad, alone, there),
        measure(f"{how_many}, jit", value_and_grad, laid_out, everywhere),
        measure(f"{how_many}, shard_map", in_parts, laid_out, everywhere),
    ]
    show(f"Neural ODE, batch of {setting.batch}", rows, console)

    optimiser = optax.adam(1e-2)
    losses = []

    @jax.jit
    def update(state, y0, paths):
        parameters, optimiser_state = state
        loss, gradient = in_parts(parameters, y0, paths)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state)
        return (optax.apply_updates(parameters, updates), optimiser_state), loss

    def update_and_note(state, step):
        state, loss = update(state, *data)
        losses.append(float(loss))
        return state, loss

    state = over(mesh, P(), (parameters, optimiser.init(parameters)))
    train(update_and_note, state, steps, console)
    return losses


STEP = 1 / 8
ROWS = P(None, AXIS)


def gray_scott(t, y, coefficients):
    """By the usual five points; `jnp.roll` sends a row over each border."""
    shifts = [jnp.roll(y, by, axis) for axis in (1, 2) for by in (1, -1)]
    spread_u, spread_v = sum(shifts) - 4 * y
    (u, v), (of_u, of_v, feed, kill) = y, coefficients
    reaction = u * v**2
    du = of_u * spread_u - reaction + feed * (1 - u)
    dv = of_v * spread_v + reaction - (feed + kill) * v
    return jnp.stack([du, dv])


def final_state(coefficients, y0, num_steps: int) -> Float[Array, "2 n n"]:
    # With `throw=True` Diffrax passes its results through a check on the host, for
    # which the compiler gathers them on one device.
    field = lambda t, y, args: gray_scott(t, y, coefficients)
    ys = solve(field, y0, num_steps * STEP, num_steps, throw=False).ys
    assert ys is not None
    return ys[0]


def lay_out_a_state(
    setting: Setting, mesh: Mesh, console: Console
) -> tuple[Float[np.ndarray, "n n"], list[list[int]]]:
    """Prints the table; returns v at the end, and the memory of one device and of each
    of all, for each number of steps."""
    coefficients, y0 = jnp.asarray(TRUE, jnp.float32), initial_state(setting.grid, 0)

    def gradient(num_steps):
        loss = lambda c, y0: jnp.mean(final_state(c, y0, num_steps)[1] ** 2)
        return jax.value_and_grad(loss)

    alone = coefficients, y0
    laid_out = over(mesh, P(), coefficients), over(mesh, ROWS, y0)
    num_steps, *_ = setting.num_steps
    field = lambda t, y, args: gray_scott(t, y, coefficients)
    rows = [
        measure(
            way,
            gradient(num_steps),
            inputs,
            round_trip_of(field, inputs[1], num_steps * STEP, num_steps, False),
        )
        for way, inputs in (
            ("one device", alone),
            (f"{mesh.size} devices, jit", laid_out),
        )
    ]
    show(f"Gray and Scott's equation, {setting.grid} by {setting.grid}", rows, console)
    memory = [[row.bytes] for row in rows]
    for sizes, inputs in zip(memory, (alone, laid_out), strict=True):
        for n in setting.num_steps[1:]:
            program = jax.jit(gradient(n)).lower(*inputs).compile()
            sizes.append(temporary_bytes(program))
    end = jax.jit(lambda c, y0: final_state(c, y0, num_steps))(*laid_out)
    return process_allgather(end, tiled=True)[1], memory


def draw(
    folder: Path,
    losses: list[float],
    v: np.ndarray,
    num_steps: tuple[int, ...],
    memory: list[list[int]],
    num_devices: int,
) -> None:
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogy(losses, color=BLUE)
    axes.set_title(f"Training over {num_devices} devices", fontsize=12)
    label(axes, "step of training", "mean squared error", legend=False)
    figure.savefig(folder / "many_devices_training.png", dpi=150)

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(v, cmap="viridis", interpolation="nearest")
    for i in range(1, num_devices):
        left.axhline(i * len(v) / num_devices - 0.5, color="white", linewidth=0.8)
    left.set_title(f"v, its rows on {num_devices} devices", fontsize=12)
    left.set_xticks([])
    left.set_yticks([])
    figure.colorbar(image, ax=left, shrink=0.85)
    ways = zip(("one device", f"each of {num_devices}"), (ORANGE, BLUE), strict=True)
    for (way, color), sizes in zip(ways, memory, strict=True):
        right.loglog(num_steps, np.divide(sizes, 2**20), "o-", color=color, label=way)
    right.set_title("Memory of the gradient", fontsize=12)
    label(right, "steps", "temporary memory of a device (MiB)")
    figure.savefig(folder / "many_devices_state.png", dpi=150)


def main() -> None:
    arguments = parse_arguments(
        "A neural ODE and a large state over many devices.",
        steps=200,
        quick="a small batch and grid, a few steps of training",
        coordinator=dict(help="HOST:PORT of process 0, to run as one of two processes"),
        process=dict(type=int, choices=(0, 1), default=0, help="which of the two"),
    )
    set_up_devices(arguments)
    first = jax.process_index() == 0
    console = Console(quiet=not first)
    setting, steps = (QUICK, 5) if arguments.quick else (FULL, arguments.steps)
    num_devices = jax.device_count()
    mesh = jax.make_mesh((num_devices,), (AXIS,), axis_types=(AxisType.Auto,))
    console.print(
        f"{num_devices} devices ({jax.devices()[0].platform}) of {jax.process_count()} "
        f"process(es), on {os.cpu_count()} cores"
    )
    if math.gcd(setting.batch, setting.grid) % num_devices:
        raise SystemExit(f"{num_devices} devices do not divide batch and grid evenly.")
    losses = train_in_parallel(setting, steps, mesh, console)
    v, memory = lay_out_a_state(setting, mesh, console)
    if first:
        draw(arguments.out, losses, v, setting.num_steps, memory, num_devices)
        console.print(f"Figures are in {arguments.out}.")


if __name__ == "__main__":
    main()
