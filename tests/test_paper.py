"""The benchmark of the paper's experiments runs, and compares what it says it does."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import diffrax as dfx
import jax.numpy as jnp
import pytest
from helpers import heavy, relative_difference
from test_examples import assert_shows_something

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = ["white_dwarf", "oscillators", "pendulum", "cubic", "moons", "cde"]


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("paper_common")


@pytest.mark.parametrize(
    "base",
    [
        *("RK4", "Dopri5"),
        *heavy("Midpoint", "Ralston", "Bosh3"),
    ],
)
def test_unrolled_stages_solve_as_the_base_does(paper, base):
    field = lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0]) + jnp.cos(t)])
    solutions = [
        dfx.diffeqsolve(
            *(dfx.ODETerm(field), solver, 0.0, 2.0, None, jnp.array([1.0, 0.0])),
            stepsize_controller=dfx.PIDController(rtol=1e-4, atol=1e-4),
            saveat=dfx.SaveAt(ts=jnp.linspace(0.1, 1.9, 7)),
        )
        for solver in (paper.unrolled(base), paper.BASES[base])
    ]
    mine, other = solutions
    assert mine.stats["num_steps"] == other.stats["num_steps"]
    # The same sums in another order; measured up to 2e-15.
    assert relative_difference(mine.ys, other.ys) < 1e-13


def test_the_published_numbers_of_checkpoints_are_those_diffrax_chooses(paper):
    # As in the authors' scripts, for 1,000 and 500 steps.
    assert paper.default_checkpoints(1000) == 44
    assert paper.default_checkpoints(500) == 31


@pytest.mark.heavy
@pytest.mark.parametrize("part", PARTS)
def test_a_part_measures_finite_numbers_and_draws_its_figure(part, tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / "paper.py"), part, "--quick"]
    command += ["--json", str(path), "--figure", str(tmp_path)]
    # Unoptimised programs are compiled in less time, and hardly run here.
    env = dict(os.environ, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refuse = lambda constant: pytest.fail(f"{constant} among the results")
    results = json.loads(path.read_text(), parse_constant=refuse)[part]
    methods = {row["method"] for row in results["equal accuracy"]}
    assert methods == {"published", "default", "checkpoints"}
    assert_shows_something(tmp_path / f"paper_{part}.png")
