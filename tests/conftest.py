import os
from pathlib import Path

import helpers
import jax
from hypothesis import HealthCheck, Phase, settings

# Most oracles need double precision; single precision is asked for by dtype.
jax.config.update("jax_enable_x64", True)


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
    if not config.option.optimise:
        compile_quickly()
    asked = config.option.examples
    settings.register_profile(
        "programs",
        max_examples=asked or 3,
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


def compile_quickly():
    """Compilation is most of the suite's time, and exactness does not depend on it.

    Of a gradient of 50 steps it took 1.8 s with all optimisations, 1.3 s without most,
    and 0.4 s without the fusion emitters too (XLA's second way of generating code for
    CPUs), where tracing takes 0.8 s.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    flag = "--xla_cpu_use_fusion_emitters=false"  # Read when XLA first compiles.
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:  # Workers inherit it.
        os.environ["XLA_FLAGS"] = f"{flags} {flag}"


def pytest_runtest_teardown(item):
    # Every compiled program maps memory, of which Linux lets a process have some 65,000
    # pieces: beyond, a run of hundreds of tests dies in the compiler.
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 30_000:
        jax.clear_caches()
