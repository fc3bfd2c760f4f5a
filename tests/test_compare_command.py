"""`reversax compare` as a command: mistakes, errors of users, options, its extra."""

import importlib.resources
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_compare import run, words, write
from typer.testing import CliRunner

import reversax as rvx
from reversax.compare._command import _explained, app
from reversax.compare._options import as_number_of_bytes

MISTAKES = {
    "no module": ("nowhere.at_all:f", 2, "There is no module 'nowhere'."),
    "no file": ("nowhere.py", 2, "There is no file"),
    "no function": ("{}:other", 2, "has no function 'other'. Its functions: returns"),
    "no problem": ("{}:returns", 2, "returned an object of type `dict`; it must"),
    "arguments": ("{}:asks", 2, "needs the arguments x, y; it must take none, or"),
    "stochastic": ("{}:stochastic", 2, "this is a stochastic equation"),
    "integers": ("{}:integers", 2, "`y0` has a leaf of dtype int64"),
    "vector": ("{}:vector", 2, "must return a real scalar; it returned an array of"),
    "no gradient": ("{}:constant", 1, "has the norm 0.0: there is nothing to compare"),
    "stiff": ("{}:stiff", 1, "There is no reference to compare with: Dopri8"),
    "terms": ("{}:two_terms", 1, "The problem was refused. TermAndSolverIncompatible"),
}
MISTAKEN = """
    import diffrax as dfx
    import jax
    import jax.numpy as jnp
    from test_compare import TERM, linear

    def returns():
        return {}

    def asks(x, y, seed):
        pass

    def stochastic():
        path = dfx.VirtualBrownianTree(0, 1, 1e-3, (), jax.random.key(0))
        noise = dfx.ControlTerm(lambda t, y, args: y, path)
        return linear(terms=dfx.MultiTerm(TERM, noise))

    def integers():
        return linear(y0=jnp.array([1, 2]))

    def vector():
        return linear(loss=lambda ys, args: ys[0])

    def constant():
        return linear(loss=lambda ys, args: jnp.sum(0 * ys))

    def stiff():
        return linear(args=jnp.array(-1e6))

    def two_terms():
        return linear(terms=(TERM, TERM))
"""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_has_its_exit_code(name, tmp_path):
    target, exit_code, message = MISTAKES[name]
    done = run(target.format(write(tmp_path, MISTAKEN)))
    assert done.exit_code == exit_code, done.output
    assert message in words(done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


ERRORS = {
    "import": "import no_such_package",
    "syntax": "def problem(:",
    "function": """
        def problem():
            return helper()
        def helper():
            return {}["missing"]
    """,
    "arguments": """
        from test_compare import linear
        def problem():
            return linear(dt0=None)
    """,
    "field": """
        import diffrax as dfx
        from test_compare import linear
        def field(t, y, args):
            return args["missing"]
        def problem():
            return linear(terms=dfx.ODETerm(field), args={})
    """,
    "loss": """
        from test_compare import linear
        def loss(ys, args):
            return ys["missing"]
        def problem():
            return linear(loss=loss)
    """,
}
LAST_LINES = {
    "import": "ModuleNotFoundError: No module named 'no_such_package'",
    "syntax": "SyntaxError: invalid syntax",
    "function": "KeyError: 'missing'",
    "arguments": "needs a `dt0` for `ConstantStepSize()`.",
    "field": "KeyError: 'missing'",
    "loss": "TypeError: ",
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_the_users_is_shown_as_such_from_their_file_on(name, tmp_path):
    path = write(tmp_path, ERRORS[name])
    done = run(path)
    assert done.exit_code == 1
    assert LAST_LINES[name] in done.stderr
    files = [x for x in done.stderr.splitlines() if x.startswith('  File "')]
    assert files
    assert str(path) in files[0]
    assert not any("site-packages" in x or "src/reversax" in x for x in files)


def test_all_of_a_traceback_is_shown_on_demand(tmp_path):
    hides = """
        def problem():
            try:
                return {}["missing"]
            except KeyError as error:
                raise ValueError("none") from error
    """
    path = write(tmp_path, hides)
    assert "--traceback" in run(path).stderr
    done = outside("-m", "reversax", "compare", str(path), "--traceback")
    assert done.returncode == 1
    assert "KeyError: 'missing'" in done.stderr
    assert "in load_problem" in done.stderr


def test_an_error_that_is_neither_theirs_nor_a_refusal_is_raised_as_it_is():
    def raised(raise_it):
        try:
            raise_it()
        except Exception as error:
            # Without this frame, which is one of theirs.
            return error.with_traceback(error.__traceback__.tb_next.tb_next)
        raise AssertionError

    refused = raised(lambda: json.loads("{"))
    assert isinstance(refused, ValueError)
    assert _explained(refused)[1].startswith("The problem was refused. JSONDecodeError")
    mistake = raised(lambda: importlib.resources.files("json.no_such"))
    with pytest.raises(ModuleNotFoundError):
        _explained(mistake)


BAD_OPTIONS = {
    "tolerance": ("--tolerance", "0", "0.0 is not above zero"),
    "memory": ("--memory-limit", "3 parsecs", "is no size, such as 512MiB"),
    "prefer": ("--prefer", "beauty", "Invalid value for '--prefer'"),
    "repeats": ("--repeats", "0", "Invalid value for '--repeats'"),
    "folder": ("--json", "no_such_folder/x.json", "There is no directory"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_ends_the_command_before_anything_is_measured(name):
    *option, message = BAD_OPTIONS[name]
    done = run("no_such_module", *option)
    assert done.exit_code == 2
    assert message in words(done.stderr.replace("│", ""))


@pytest.mark.parametrize(
    ("text", "number"),
    [("512MiB", 2**29), ("2e9", 2 * 10**9), ("1.5 GB", 15 * 10**8), ("3 kB", 3000)],
)
def test_a_size_is_read_with_its_unit(text, number):
    assert as_number_of_bytes(text) == number


def outside(*arguments, **kwargs):
    """Another process, with what it wrote."""
    # The checkout, which need not be installed.
    env = dict(os.environ, PYTHONPATH=str(Path(rvx.__file__).parents[1]))
    return subprocess.run(
        [sys.executable, *arguments],
        env=env,
        capture_output=True,
        text=True,
        **kwargs,
    )


def test_importing_reversax_imports_none_of_what_the_command_needs():
    code = (
        "import sys, reversax, reversax.compare\n"
        "print({'typer', 'rich', 'matplotlib'} & set(sys.modules))"
    )
    assert outside("-c", code).stdout == "set()\n"


def test_without_the_extra_the_command_says_how_to_get_it():
    code = "import sys; sys.modules['typer'] = None; import reversax.__main__"
    done = outside("-c", code)
    assert done.returncode == 1
    assert "pip install '.[compare]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_runs_as_a_module_and_finds_others_where_it_is(tmp_path):
    write(tmp_path, "def f():\n    return 1", "mine.py")
    done = outside("-m", "reversax", "compare", "mine:f", cwd=tmp_path)
    assert done.returncode == 2
    assert "mine:f returned an object of type `int`" in done.stderr


def test_the_version_is_that_of_the_package():
    done = CliRunner().invoke(app, ["--version"])
    assert done.stdout == f"reversax {rvx.__version__}\n"


def test_a_module_that_imports_what_is_not_there_is_not_taken_for_missing(
    tmp_path, monkeypatch
):
    write(tmp_path, "import no_such_package", "imports_nothing.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    done = run("imports_nothing:problem")
    assert done.exit_code == 1
    assert "ModuleNotFoundError: No module named 'no_such_package'" in done.stderr
