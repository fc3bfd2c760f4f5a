"""What a device makes of reversax: are the bits exact there, and what does it cost?

    python benchmarks/device.py                    # at most 8 minutes
    python benchmarks/device.py --json device.json
    python benchmarks/device.py --quick            # to see that it runs, on a CPU too

- `bits`: gradients of 64 steps through five fields, in both precisions, alone and under
  `vmap`. Their certificate allows no wrong bit, so a row says whether it passed; for
  each way to isolate the evaluations: by the conditional that reversax has, by
  `optimization_barrier`, and not at all; and on a GPU again, in a process of its own,
  with deterministic operations.
- `cost`: the time and the temporary bytes of a gradient of 200 steps, by reversax, by
  Diffrax's default checkpoints, and of a `jax.lax.scan` of Heun's method that keeps the
  states alone.

It needs nothing but what reversax depends on. A row that fails says why, and the next
one follows; when the time is up the rest is left out, and it says so.
"""

import argparse
import functools as ft
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from problems import mlp, normal_weights, reaction_diffusion

import reversax
from reversax._schemes import fields as _fields
from reversax._xla import isolation as _isolation

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
BASES = {"Euler": diffrax.Euler(), "Heun": diffrax.Heun(), "Tsit5": diffrax.Tsit5()}


# The fields.


def network(size: int) -> tuple[Any, Callable]:
    net = eqx.nn.MLP(size, size, 64, 2, activation=jnp.tanh, key=jax.random.key(0))
    return net, lambda t, y, net: net(y) - 2 * y


def recurrent(size: int) -> tuple[Any, Callable]:
    cell = eqx.nn.GRUCell(size, size, key=jax.random.key(1))
    return cell, lambda t, y, cell: cell(jnp.cos(t * jnp.ones_like(y)), y) - y


def attention(size: int) -> tuple[Any, Callable]:
    heads = eqx.nn.MultiheadAttention(2, size, key=jax.random.key(2))

    def field(t, y, heads):
        tokens = jnp.stack([y, jnp.tanh(y), jnp.sin(y + t), y * y])
        return heads(tokens, tokens, tokens).mean(axis=0) - y

    return heads, field


def convolution(size: int) -> tuple[Any, Callable]:
    keys = jax.random.split(jax.random.key(3))
    first = eqx.nn.Conv1d(1, 8, 5, padding=2, key=keys[0])
    second = eqx.nn.Conv1d(8, 1, 5, padding=2, key=keys[1])

    def field(t, y, layers):
        first, second = layers
        return second(jnp.tanh(first(y[None])))[0] - y

    return (first, second), field


def stencil(size: int) -> tuple[Any, Callable]:
    def field(t, y, strength):
        left, right = jnp.roll(y, 1), jnp.roll(y, -1)
        return strength * (left - 2 * y + right) + y * (1 - y * y)

    return jnp.asarray(0.3), field


FIELDS = (network, recurrent, attention, convolution, stencil)


# Whether the bits are exact.


def _behind_barriers(fn, x, rest, run_time):
    arrays, static = eqx.partition((x, rest), eqx.is_array)
    x, rest = eqx.combine(lax.optimization_barrier(arrays), static)
    evaluation = _isolation.evaluate(fn, x, rest)
    value = lax.optimization_barrier(evaluation.value)
    return evaluation._replace(value=value)


def _not_at_all(fn, x, rest, run_time):
    return _isolation.evaluate(fn, x, rest)


ISOLATIONS = {
    "conditional": _isolation.evaluate_isolated,
    "barrier": _behind_barriers,
    "neither": _not_at_all,
}


def cast(tree: Any, dtype: Any) -> Any:
    leaf = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    return jax.tree.map(leaf, tree)


def round_trip(make: Callable, dtype: Any, lanes: int | None, size: int) -> None:
    """Takes a gradient, which raises if one bit differs."""
    args, field = make(size)
    args = cast(args, dtype)
    y0 = jnp.linspace(-1.0, 1.0, size, dtype=dtype)
    y0 = y0 if lanes is None else y0 * jnp.linspace(0.5, 1, lanes, dtype=dtype)[:, None]
    arrays, static = eqx.partition(args, eqx.is_array)

    def solve(arrays, y0):
        solution = diffrax.diffeqsolve(
            *(diffrax.ODETerm(field), reversax.Reversible(BASES["Heun"])),
            *(0.0, 2.0, 1 / 32, y0, eqx.combine(arrays, static)),
            adjoint=reversax.ReversibleAdjoint(),
        )
        assert solution.ys is not None
        return solution.ys

    solve = solve if lanes is None else jax.vmap(solve, (None, 0))
    loss = lambda arrays, y0: jnp.mean(solve(arrays, y0) ** 2)
    jax.block_until_ready(eqx.filter_jit(jax.grad(loss))(arrays, y0))


def bits_cases(quick: bool) -> Iterator[tuple[dict, Callable]]:
    deterministic = DETERMINISTIC in os.environ.get("XLA_FLAGS", "")
    fields = FIELDS[::4] if quick else FIELDS
    isolations = dict(list(ISOLATIONS.items())[: 1 if quick or deterministic else 3])
    size, many = (8, 4) if quick else (64, 256)
    for isolation, evaluate in isolations.items():
        for dtype in (jnp.float32,) if quick else (jnp.float32, jnp.float64):
            for lanes in (None, many):
                for make in fields:
                    about = {
                        "field": make.__name__,
                        "dtype": jnp.dtype(dtype).name,
                        "lanes": lanes or 1,
                        "isolation": isolation,
                        "deterministic": deterministic,
                    }
                    case = ft.partial(round_trip, make, dtype, lanes, size)
                    yield about, ft.partial(_exactly, evaluate, case, dtype)


def _exactly(evaluate: Callable, case: Callable[[], None], dtype: Any) -> dict:
    with jax.enable_x64(dtype == jnp.float64):
        _fields.evaluate_isolated = evaluate
        try:
            case()
        except eqx.EquinoxRuntimeError as error:
            if "did not find the initial state again" not in str(error):
                raise
            return {"exact": False}
        finally:
            _fields.evaluate_isolated = _isolation.evaluate_isolated
    return {"exact": True}


# What a gradient costs.


def swinging(t, y, args):
    return jnp.stack([y[1], -args * jnp.sin(y[0])])


def lorenz(t, y, args):
    x, u, z = y
    return jnp.stack([args[0] * (u - x), x * (args[1] - z) - u, x * u - args[2] * z])


def dense(width: int, batch: int) -> tuple:
    rng = np.random.default_rng(0)
    weights = normal_weights(rng, width, width, width)
    field = lambda t, y, args: mlp(jnp, y, args)
    return field, weights, rng.standard_normal((batch, width)), 1.0, False


def diffusing(size: int) -> tuple:
    problem = reaction_diffusion(0, size)
    field = lambda t, y, args: problem.field(jnp, t, y, args)
    return field, problem.parameters, problem.y0, 64.0, False


def cost_problems(quick: bool) -> dict[str, Callable[[], tuple]]:
    """Field, arguments, initial state, end, and whether it is solved under `vmap`."""
    rng, rates = np.random.default_rng(1), np.array([10.0, 28.0, 8 / 3])
    number, batch, size = (8, 4, 8) if quick else (4_096, 1_024, 256)
    problems: dict[str, Callable[[], tuple]] = {
        "pendulum": lambda: (swinging, np.array(1.3), np.array([1, 0.2]), 10.0, False),
        f"Lorenz, {number} lanes": lambda: (
            *(lorenz, rates, rng.standard_normal((number, 3)), 1.0, True),
        ),
    }
    for width in (8,) if quick else (256, 1_024):
        problems[f"network, width {width}"] = ft.partial(dense, width, batch)
    problems[f"reaction-diffusion, {size} x {size}"] = ft.partial(diffusing, size)
    return problems


def by_diffrax(solver, adjoint, field, t1, steps) -> Callable:
    def solve(args, y0):
        return diffrax.diffeqsolve(
            *(diffrax.ODETerm(field), solver, 0.0, t1, t1 / steps, y0, args),
            adjoint=adjoint,
            max_steps=steps + 1,
        ).ys

    return solve


def by_scan(solver, adjoint, field, t1, steps) -> Callable:
    """Heun's method, of which the states alone are kept."""
    h = t1 / steps

    def solve(args, y0):
        @jax.checkpoint
        def step(y, t):
            first = field(t, y, args)
            return y + h / 2 * (first + field(t + h, y + h * first, args)), None

        return lax.scan(step, y0, h * jnp.arange(steps, dtype=y0.dtype))[0]

    return solve


METHODS = {
    "Reversible(Euler), reversed": (
        by_diffrax,
        reversax.Reversible(BASES["Euler"]),
        reversax.ReversibleAdjoint(),
    ),
    "Reversible(Tsit5), reversed": (
        by_diffrax,
        reversax.Reversible(BASES["Tsit5"]),
        reversax.ReversibleAdjoint(),
    ),
    "Heun, checkpoints": (
        by_diffrax,
        BASES["Heun"],
        diffrax.RecursiveCheckpointAdjoint(),
    ),
    "Tsit5, checkpoints": (
        by_diffrax,
        BASES["Tsit5"],
        diffrax.RecursiveCheckpointAdjoint(),
    ),
    "Heun, rematerialised scan": (by_scan, None, None),
}


_STEPS = 200


def cost_of(make: Callable[[], tuple], method: str, steps: int) -> dict:
    (by, *how), (field, args, y0, t1, vmap) = METHODS[method], make()
    args, y0 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (args, y0))
    solve = by(*how, field, t1 * steps / _STEPS, steps)
    solve = jax.vmap(solve, (None, 0)) if vmap else solve
    loss = lambda args, y0: jnp.mean(solve(args, y0) ** 2)
    start = time.perf_counter()
    gradient: Any = eqx.filter_jit(jax.grad(lambda x: loss(*x)))
    run = gradient.lower((args, y0)).compile()
    seconds, memory = time.perf_counter() - start, run.compiled.memory_analysis()
    run = ft.partial(run, (args, y0))
    jax.block_until_ready(run())
    times = []
    while len(times) < 5 and sum(times) < 5:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return {
        "microseconds a step": statistics.median(times) / steps * 1e6,
        "bytes": None if memory is None else memory.temp_size_in_bytes,
        "seconds to compile": seconds,
    }


def cost_cases(quick: bool) -> Iterator[tuple[dict, Callable]]:
    steps = 10 if quick else _STEPS
    for problem, make in cost_problems(quick).items():
        for method in METHODS:
            about = {"problem": problem, "method": method}
            yield about, ft.partial(cost_of, make, method, steps)


# Running them.


def attempted(case: Callable[[], dict]) -> dict:
    try:
        return case()
    # Whatever a device cannot do: the row says what, and the others go on.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[-1][:200]}"}


def measured(cases: Iterator[tuple[dict, Callable]], until: float) -> list[dict]:
    rows = []
    for about, case in cases:
        if time.monotonic() > until:
            row = about | {"failed": "left out: the time was up"}
        else:
            row = about | attempted(case)
        rows.append(row)
        print("  ".join(_cell(x) for x in row.values()), flush=True)
    return rows


def _cell(x: Any) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def deterministically(options: argparse.Namespace, until: float) -> list[dict]:
    """The bits again, in a process of its own: flags are read once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "device.json"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}"
        seconds = max(1.0, until - time.monotonic())
        command = [sys.executable, __file__, "bits", "--json", str(path)]
        command += ["--seconds", str(seconds), *["--quick"] * options.quick]
        environment = os.environ | {"XLA_FLAGS": flags}
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        subprocess.run(command, env=environment, check=True)
        return json.loads(path.read_text())["bits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("part", nargs="?", choices=("bits", "cost"), help="by default both")
    add("--seconds", type=float, default=450, help="after which no row is begun")
    add("--quick", action="store_true", help="a smoke test")
    add("--json", type=Path, metavar="PATH", help="where to write the results")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    device = jax.devices()[0]
    about: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "host": platform.platform(),
        "versions": {x.__name__: x.__version__ for x in (jax, diffrax, eqx)},
    }
    print(about, flush=True)
    results: dict[str, list[dict]] = {}
    if options.part in (None, "cost"):
        results["cost"] = measured(cost_cases(options.quick), until)
    if options.part in (None, "bits"):
        results["bits"] = measured(bits_cases(options.quick), until)
        once = DETERMINISTIC in os.environ.get("XLA_FLAGS", "")
        if device.platform == "gpu" and not once:
            results["bits"] += attempted_rows(options, until)
    if options.json is not None:
        options.json.write_text(json.dumps(about | results, indent=1) + "\n")


def attempted_rows(options: argparse.Namespace, until: float) -> list[dict]:
    row = attempted(lambda: {"rows": deterministically(options, until)})
    return row.get("rows", [row | {"deterministic": True}])


if __name__ == "__main__":
    main()
