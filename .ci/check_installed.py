"""Checks an installed reversax, with nothing but its core dependencies beside it.

cd /anywhere/else && /an/environment/bin/python -I check_installed.py
"""

import importlib.metadata
import importlib.resources
import math
import re
import sys
from pathlib import Path

import diffrax
import jax

import reversax

CORE = {"jax", "equinox", "diffrax", "jaxtyping"}


def required(distribution: importlib.metadata.Distribution) -> tuple[set, set]:
    """The names of what a distribution requires, and of what its extras do."""
    always, extra = set(), set()
    for line in distribution.requires or []:
        name = re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-")
        (extra if "extra ==" in line else always).add(name)
    return always, extra


def check_metadata() -> None:
    installed = {d.name.lower().replace("_", "-"): d for d in distributions()}
    own = installed["reversax"]
    assert own.version == reversax.__version__, (own.version, reversax.__version__)
    assert own.metadata["Description-Content-Type"] == "text/markdown"
    assert own.metadata["License-Expression"] == "Apache-2.0"
    assert any(str(file).endswith("LICENSE") for file in own.files or [])
    core, extras = required(own)
    assert core == CORE, core
    by_others = set().union(
        *(required(d)[0] for name, d in installed.items() if name != "reversax")
    )
    # JAX itself brings scipy.
    unwanted = installed.keys() & (extras - by_others - {"reversax"})
    assert not unwanted, f"the environment is not clean: {unwanted}"


def distributions() -> list[importlib.metadata.Distribution]:
    return list(importlib.metadata.distributions())


def check_files() -> None:
    package = importlib.resources.files("reversax")
    assert (package / "py.typed").is_file(), "the types would not be found"
    home = Path(str(reversax.__file__))
    assert home.is_relative_to(sys.prefix), f"imported from elsewhere: {home}"


def check_gradient() -> None:
    """`y' = -a*y` from 1 has `y(1) = exp(-a)`, of which the derivative is the same,
    negative."""

    def final(a, adjoint):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -args * y),
            reversax.Reversible(diffrax.Tsit5()),
            0.0,
            1.0,
            0.02,
            jax.numpy.ones(3),
            a,
            adjoint=adjoint,
        )
        assert solution.ys is not None
        return solution.ys.mean()

    adjoint = reversax.ReversibleAdjoint()
    value, slope = jax.jit(jax.value_and_grad(lambda a: final(a, adjoint)))(0.5)
    exact = math.exp(-0.5)
    # Fifty steps in single precision, of which an ulp is 6e-8; measured 2e-7.
    for got, expected in ((value, exact), (slope, -exact)):
        assert abs(float(got) / expected - 1) < 2e-6, (got, expected)


check_metadata()
check_files()
check_gradient()
print(f"reversax {reversax.__version__} at {Path(str(reversax.__file__)).parent}: well")
