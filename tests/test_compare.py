"""`reversax compare`: its measurements against exact ones."""

import json
import re
import textwrap
from pathlib import Path

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from typer.testing import CliRunner

import reversax as rvx
from reversax.compare import Candidate, Problem, default_candidates
from reversax.compare._command import app
from reversax.compare._gradient import (
    Method,
    gradient_error,
    gradient_of,
    solve_reference,
    split,
)
from reversax.compare._load import load_problem
from reversax.compare._measure import Options, compare
from reversax.compare._plot import _COLOURS
from reversax.compare._problem import prepared
from reversax.compare._search import step_counts

TERM = dfx.ODETerm(lambda t, y, rate: rate * y)
RATE, Y0 = -1.3, np.array([1.0, -0.5])
CHECKPOINTS = dfx.RecursiveCheckpointAdjoint()


def linear(**kwargs):
    """`y' = a*y`, and the squares of `y(1)`: all is known exactly."""
    defaults = dict(
        terms=TERM,
        y0=jnp.asarray(Y0),
        t0=0.0,
        t1=1.0,
        dt0=1 / 8,
        args=jnp.array(RATE),
        loss=lambda ys, args: jnp.sum(ys**2),
    )
    return Problem(**(defaults | kwargs))


def by_growth(growth, derivative):
    """The exact gradient, if `y(1)` is `growth(a)*y0`."""
    return dict(
        terms=np.zeros(0),
        y0=2 * growth**2 * Y0,
        args=np.array([2 * growth * derivative * np.sum(Y0**2)]),
    )


def exact():
    return by_growth(np.exp(RATE), np.exp(RATE))


def by_heun(steps):
    h = 1 / steps
    factor = 1 + h * RATE + (h * RATE) ** 2 / 2
    slope = steps * factor ** (steps - 1) * h * (1 + h * RATE)
    return by_growth(factor**steps, slope)


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


TOLERANCE = 2e-3
MODULE = """
    import diffrax as dfx
    import jax.numpy as jnp
    from test_compare import CHECKPOINTS, Candidate, linear
    import reversax as rvx
    from reversax.compare._scan import RematerialisedScan

    HEUN = Candidate("Heun", dfx.Heun(), CHECKPOINTS)
    REVERSIBLE = Candidate(
        "reversible Euler",
        rvx.Reversible(dfx.Euler()),
        rvx.ReversibleAdjoint(),
        dt0=1 / 64,
    )
    CAUTIONARY = Candidate("backsolve", dfx.Bosh3(), dfx.BacksolveAdjoint())
    CONTROL = Candidate("scan", dfx.Heun(), RematerialisedScan())

    def problem(seed):
        assert seed == 5
        return linear(dt0=1 / 16, candidates=[HEUN, REVERSIBLE, CAUTIONARY, CONTROL])
"""


def words(text):
    return " ".join(text.split())


def write(folder, text, name="their_problem.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One run of the command, with all that it writes."""
    folder = tmp_path_factory.mktemp("compare")
    path = write(folder, MODULE)
    done = run(
        *(f"{path}:problem", "--seed", 5, "--tolerance", TOLERANCE, "--repeats", 2),
        *("--json", folder / "out.json", "--plot", folder / "out.png"),
    )
    assert done.exit_code == 0, done.output
    return done, json.loads((folder / "out.json").read_text()), folder / "out.png"


def test_the_gradient_error_is_that_of_the_discrete_solve_to_the_exact_gradient(
    compared,
):
    heun = compared[1]["candidates"][0]
    steps = round(1 / heun["dt0"])
    expected = gradient_error(by_heun(steps), exact())
    # The reference is known to some 1e-12, the error is some 1e-4.
    assert heun["gradient_error"] == pytest.approx(expected, rel=1e-6)
    values = [g["y0"] @ Y0 / 2 for g in (by_heun(steps), exact())]
    assert heun["value_error"] == pytest.approx(values[0] / values[1] - 1, rel=1e-6)


def test_the_fewest_steps_are_found_whose_gradient_is_accurate_enough(compared):
    heun = compared[1]["candidates"][0]
    steps = round(1 / heun["dt0"])
    fewer = max(n for n in step_counts(4096) if n < steps)
    assert gradient_error(by_heun(steps), exact()) <= TOLERANCE
    assert gradient_error(by_heun(fewer), exact()) > TOLERANCE
    assert steps / fewer < 2**0.3  # Four in an octave, as far as integers go.
    assert heun["num_steps"] == steps
    assert heun["max_steps"] == steps + 1


def test_the_json_file_holds_what_was_measured_and_where(compared):
    content = compared[1]
    assert content["format"] == 2
    assert content["seed"] == 5
    assert content["versions"]["reversax"] == rvx.__version__
    assert content["device"]["platform"] == jax.devices()[0].platform
    assert content["options"]["tolerance"] == TOLERANCE
    exact_value = np.sum(Y0**2) * np.exp(2 * RATE)
    assert content["reference"]["value"] == pytest.approx(exact_value, rel=1e-11)
    assert 0 < content["reference"]["uncertainty"] < 1e-9  # Measured: 5e-11.
    for candidate in content["candidates"]:
        assert candidate["failure"] is None
        assert candidate["temporary_bytes"] > 0
        assert candidate["compile_seconds"] > 0
        assert len(candidate["seconds"]) == 2
        assert candidate["median_seconds"] == np.median(candidate["seconds"])
    round_trips = [x["round_trip"] for x in content["candidates"]]
    assert round_trips == [None, 0.0, None, None]  # To the bit, in fixed point.


def test_the_table_names_every_candidate_its_verdict_and_what_to_take(compared):
    done, content, _ = compared
    chosen = content["recommendation"]["chosen"]
    assert chosen in ("Heun", "reversible Euler")
    assert f"Take {chosen}, with" in done.stdout
    control = content["candidates"][-1]
    assert control["adjoint"] == "RematerialisedScan()"
    heun = content["candidates"][0]
    assert control["num_steps"] == heun["num_steps"]
    # The same discrete gradient, by another program.
    assert control["gradient_error"] == pytest.approx(heun["gradient_error"], rel=1e-9)
    assert f"what one would write by hand, {control['candidate']}:" in words(
        done.stdout
    )
    rows = ("backsolve", "unchecked"), (control["candidate"], "control")
    for name, verdict in (*rows, (chosen, "take it")):
        (row,) = [x for x in done.stdout.splitlines() if x.startswith(f"│ {name} ")]
        assert row.rstrip(" │").endswith(verdict)
    assert "the 2 numbers in y0 and the 1 numbers in args" in words(done.stdout)


def test_it_says_what_it_does_where_there_is_no_terminal_and_beside_the_output(
    compared,
):
    done, content, _ = compared
    lines = done.stderr.splitlines()
    assert all(re.match(r"\[ *\d+ s\] \S.*\.$", line) for line in lines)
    count = len(content["candidates"])
    for i, candidate in enumerate(content["candidates"]):
        told = f"({i + 1} of {count}) {candidate['candidate']}: compiles"
        # To search, and to measure; but the control has the steps of Heun.
        compiled = 1 if candidate["candidate"] == "scan" else 2
        assert sum(told in line for line in lines) == compiled
    assert "] The reference" in lines[0]
    assert lines[-1].endswith("2 of 2.")
    assert "compiles" not in done.stdout


def test_the_plot_shows_every_candidate_in_its_colour(compared):
    pixels = imread(compared[2])[..., :3]
    assert min(pixels.shape[:2]) > 300
    for colour in _COLOURS[:3]:
        is_colour = np.abs(pixels - to_rgb(colour)).max(axis=-1) < 0.02
        assert is_colour.sum() > 50


def test_a_problem_in_single_precision_has_a_reference_in_double():
    problem = linear(y0=jnp.asarray(Y0, jnp.float32), args=jnp.array(RATE, jnp.float32))
    reference = solve_reference(prepared(problem), tolerance=1e-3)
    growth = np.exp(float(np.float32(RATE)))  # As the problem has it.
    # Measured: 3e-13 and 2e-12.
    assert reference.value == pytest.approx(np.sum(Y0**2) * growth**2, rel=1e-11)
    assert gradient_error(reference.parts, by_growth(growth, growth)) < 1e-10


def test_what_fails_is_a_row_that_says_why():
    """One that cannot be undone, one that is refused, and one of too many steps."""
    published = rvx.Reversible(dfx.Euler(), rvx.McCallumFoster())
    given = dfx.StepTo(ts=jnp.linspace(0.0, 1.0, 257))
    short = dfx.PIDController(rtol=1e-3, atol=1e-3, dtmax=1 / 1024)
    adjoint = rvx.ReversibleAdjoint()
    candidates = [
        Candidate("published", published, adjoint, stepsize_controller=given),
        Candidate("refused", dfx.Heun(), adjoint, stepsize_controller=given),
        Candidate("too many", dfx.Heun(), CHECKPOINTS, stepsize_controller=short),
    ]
    damped = linear(
        dt0=None,
        args=jnp.array(-40.0),
        saveat=dfx.SaveAt(ts=jnp.array([0.05, 0.1])),
        max_steps=256,
        candidates=candidates,
    )
    _, (published, refused, too_many) = compare(damped, Options(), print)
    assert "drove the twins apart" in published.failure
    assert refused.failure.startswith("TypeError")
    assert "Wrap an explicit solver" in refused.failure
    assert refused.temporary_bytes is None
    assert "maximum number of solver steps" in too_many.failure
    assert all(x.gradient_error is None for x in (published, refused, too_many))


@pytest.mark.heavy
def test_a_batch_is_solved_element_by_element():
    """Each with adaptive steps of its own, and so with as few as it takes."""
    y0 = jnp.array([[1e-6, 0.0], [1.0, 2.0], [300.0, 100.0]])
    solver = rvx.Reversible(dfx.Heun(), rvx.McCallumFoster())
    candidate = Candidate("reversible", solver, rvx.ReversibleAdjoint())
    problem = linear(
        y0=y0,
        dt0=None,
        loss=lambda ys, args: jnp.mean(ys**2),
        batched=True,
        stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-6),
        candidates=[candidate],
    )
    options = Options(tolerance=1e-6, repeats=1)
    reference, (measurement,) = compare(problem, options, print)
    value = np.mean(np.square(y0)) * np.exp(2 * RATE)
    assert reference.value == pytest.approx(value, rel=1e-10)
    assert reference.parts["y0"] == pytest.approx(
        np.ravel(y0) * np.exp(2 * RATE) / 3, rel=1e-8, abs=1e-12
    )
    assert measurement.failure is None
    assert 1e-9 < measurement.gradient_error < 1e-5
    assert 0 < measurement.round_trip < 1e-10
    # The mean over elements, of which the first takes few steps.
    assert measurement.num_steps != round(measurement.num_steps)


def test_what_functions_close_over_and_controls_are_constant():
    ts = jnp.linspace(0.0, 1.0, 5)
    path = dfx.LinearInterpolation(ts, jnp.stack([ts, ts**2], axis=1))
    network = eqx.nn.Linear(2, 4, key=jax.random.key(0))
    terms = dfx.ControlTerm(network, path)
    problem = prepared(linear(terms=terms, args=(2.0, 3, jnp.array([1.0]))))
    differentiated, _ = split(problem)
    assert differentiated.terms.vector_field.weight is not None
    assert jax.tree.leaves(differentiated.terms.control) == []
    assert [x.shape for x in jax.tree.leaves(differentiated.args)] == [(1,)]


def test_an_implicit_base_is_compared_beside_reversible_tsit5():
    names = [x.name for x in default_candidates(dfx.Kvaerno5())]
    assert "Kvaerno5, checkpointed" in names
    assert "Reversible(Tsit5)" in names
    assert "Reversible(SymmetricMultistep)" in names
    assert len(set(names)) == len(names) == 10
    names = [x.name for x in default_candidates(dfx.Tsit5(), ordinary=False)]
    assert "Reversible(SymmetricMultistep)" not in names


@pytest.mark.parametrize(
    "saveat",
    [dfx.SaveAt(steps=True), dfx.SaveAt(dense=True), dfx.SaveAt(solver_state=True)],
    ids=["steps", "dense", "nothing"],
)
def test_what_depends_on_the_solvers_own_steps_is_refused(saveat):
    with pytest.raises(ValueError, match="must not depend on the solver's own steps"):
        linear(saveat=saveat)


def test_the_example_is_a_problem_with_a_gradient_of_its_network():
    example = Path(__file__).parents[1] / "examples" / "compare_problem.py"
    differentiated, rest = split(prepared(load_problem(f"{example}", seed=1)))
    (candidate, *_) = default_candidates(rest.solver)
    controller = rest.stepsize_controller
    method = Method(candidate.solver, candidate.adjoint, rest.dt0, controller, 100)
    of = lambda trained: gradient_of(trained, rest, method)
    gradient = jax.eval_shape(of, differentiated)
    assert gradient.value.shape == ()
    weights = eqx.filter(gradient.parts.args, lambda x: hasattr(x, "shape"))
    assert sum(x.size for x in jax.tree.leaves(weights)) == 1608
