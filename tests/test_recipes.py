"""The recipes for other packages run, and the gradient is that by their own default.

pip install '.[test,recipes]'
pytest -m recipes
"""

import re
import runpy
import tomllib
from pathlib import Path

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest

import reversax as rvx

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "recipes").glob("with_*.py"))
PAGE = (ROOT / "docs" / "recipes.md").read_text()
# Steps of a controller. An error estimate is a difference of nearly equal numbers, so
# that the round-off by which two programs differ changes the length of a step in its
# eighth digit, and the solution by as much of its own error, some 1e-6.
ADAPTIVE = {"with_hallsim": 1e-11, "with_stochastix": 1e-11}
CONSTANT = 1e-13  # Measured up to 2e-15: the round-off of some dozens of steps.

name_of = lambda script: script.stem


def largest(x):
    return jnp.max(jnp.abs(x))


@pytest.fixture
def solves(monkeypatch):
    """The solves that `ReversibleAdjoint` was given."""
    real, solves = rvx.ReversibleAdjoint.loop, []

    def loop(self, **problem):
        solves.append(problem)
        return real(self, **problem)

    monkeypatch.setattr(rvx.ReversibleAdjoint, "loop", loop)
    return solves


@pytest.mark.recipes
@pytest.mark.filterwarnings("ignore")  # What the packages warn of is not ours.
@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_gradient_is_that_by_the_default_adjoint_of_the_package(script, solves):
    names = runpy.run_path(str(script))
    assert solves, "the adjoint was not handed on"
    ours, theirs = names["gradient"], names["checkpointed"]
    assert ours.dtype == theirs.dtype == jnp.float64
    assert largest(theirs) > 1e-3
    difference = largest(ours - theirs) / largest(theirs)
    assert difference <= ADAPTIVE.get(name_of(script), CONSTANT)


@pytest.mark.recipes
@pytest.mark.filterwarnings("ignore")
def test_a_hundred_thousand_steps_of_cd_dynamax_take_less_memory_than_checkpoints(
    solves,
):
    names = runpy.run_path(str(ROOT / "examples" / "recipes" / "with_cd_dynamax.py"))

    def temporary_bytes(**adjoint):
        gradient = jax.jit(jax.grad(lambda weights: names["loss"](weights, **adjoint)))
        compiled = gradient.lower(names["weights"]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporary_bytes(adjoint=rvx.ReversibleAdjoint())
    assert {problem["max_steps"] for problem in solves} == {100_000}
    theirs = temporary_bytes(adjoint=dfx.RecursiveCheckpointAdjoint())
    assert ours < theirs / 4  # A ninth, for 50 observations of four numbers.


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_page_shows_the_script_which_is_short(script):
    assert f'--8<-- "recipes/{script.name}"' in PAGE
    lines = [line for line in script.read_text().splitlines() if line.strip()]
    assert 10 <= len(lines) <= 24


def test_page_names_the_versions_that_the_extra_installs():
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    pinned = {tuple(pin.split("==")) for pin in extras["recipes"]}
    named = re.findall(r"^## `?([\w-]+)`? (\d\S*)$", PAGE, re.MULTILINE)
    assert pinned == {(name.lower(), version) for name, version in named}
    assert len(named) == len(SCRIPTS)
