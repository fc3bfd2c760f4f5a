import gc
from pathlib import Path

import helpers
import jax
import pytest
from hypothesis import HealthCheck, Phase, settings

from reversax._schemes import multistep

# Most oracles need double precision; single precision is asked for by dtype.
jax.config.update("jax_enable_x64", True)

# Tracing makes small objects by the million, most of which stay in caches. Python would
# look through all of them every few hundred, a sixth of the suite's time.
gc.set_threshold(200_000, 20, 100)


def pytest_addoption(parser):
    parser.addoption(
        "--optimise",
        action="store_true",
        help="compile as users do, with all of XLA's optimisations: slower to run",
    )
    parser.addoption(
        "--scheme",
        choices=list(helpers.SCHEMES),
        default=helpers.FEATURES_IN,
        help="the scheme in which the features of the adjoint are tested",
    )
    parser.addoption(
        "--examples",
        type=int,
        help="how many random programs to test, rather than a few fixed ones",
    )


def pytest_configure(config):
    helpers.FEATURES_IN = config.option.scheme
    # Compilation is most of the suite's time, and exactness does not depend on it.
    jax.config.update("jax_disable_most_optimizations", not config.option.optimise)
    asked = config.option.examples
    settings.register_profile(
        "programs",
        max_examples=asked or 2,
        derandomize=asked is None,
        # A program takes seconds to compile: who did not ask for many of them is not
        # to wait for the smallest that fails.
        phases=[Phase.generate, *([Phase.shrink] if asked else [])],
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )


def pytest_collection_modifyitems(config, items):
    # Neither daily nor part of "heavy or not heavy": they need an extra of their own.
    if "recipes" in config.option.markexpr:
        return
    recipes = [item for item in items if item.get_closest_marker("recipes")]
    config.hook.pytest_deselected(items=recipes)
    items[:] = [item for item in items if item not in recipes]


def pytest_runtest_teardown(item):
    # Every compiled program maps memory, of which Linux lets a process have some 65,000
    # pieces: beyond, a run of hundreds of tests dies in the compiler.
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def optimised():
    """For tests of what the optimised program is like."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def ring_of_any_size(monkeypatch):
    """For multistep methods: states of tests are small, what is worth keeping not."""
    monkeypatch.setattr(multistep, "WORTH_KEEPING", 0)
