"""Finds the user's function and calls it; shows its errors as the user's own."""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from ._problem import Problem, Refusal

DEFAULT_FUNCTION = "problem"
_OURS = Path(__file__).parents[1]
_STANDARD = Path(sysconfig.get_path("stdlib"))


class TheirError(Exception):
    """An error in the user's code; the message is its traceback, from there on."""


def load_problem(target: str, seed: int) -> Problem:
    """Imports `MODULE:FUNCTION` or `FILE.py:FUNCTION`, and calls the function.

    **Raises:** `Refusal` if there is no such function, or it does not return a problem;
    `TheirError` for errors within.
    """
    module, name = _parse(target)
    loaded = _import_file(module) if module.endswith(".py") else _import(module)
    function = _find(loaded, module, name)
    accepts_seed = _accepts_seed(function, f"{module}:{name}")
    with _their_code():
        problem = function(seed=seed) if accepts_seed else function()
    if not isinstance(problem, Problem):
        raise Refusal(
            f"{module}:{name} returned an object of type "
            f"`{type(problem).__name__}`; it must return a "
            "`reversax.compare.Problem(...)`.",
            exit_code=2,
        )
    return problem


@contextlib.contextmanager
def _their_code() -> Iterator[None]:
    """In which only code of the user's runs, so that any error is one of theirs."""
    try:
        yield
    except Exception as error:
        raise TheirError(their_traceback(error) or _only_message(error)) from error


def _parse(target: str) -> tuple[str, str]:
    module, colon, name = target.rpartition(":")
    # A path may have a colon of its own.
    if not colon or target.endswith(".py"):
        return target, DEFAULT_FUNCTION
    return module, name


def _import_file(filename: str) -> ModuleType:
    path = Path(filename).resolve()
    if not path.is_file():
        raise Refusal(f"There is no file {path}.", exit_code=2)
    # As if the file were run: it finds its neighbours, and is found by its own classes.
    sys.path.insert(0, str(path.parent))
    name = f"compared_{path.stem}"  # Which hides no other module.
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _their_code():
        spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with _their_code():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if name != missing and not name.startswith(missing + "."):
                raise  # It exists, and imports another that does not.
    raise Refusal(
        f"There is no module {missing!r}. Give a module that Python finds from {here}, "
        "or a path that ends in `.py`.",
        exit_code=2,
    )


def _find(module: ModuleType, module_name: str, name: str) -> Callable:
    function = getattr(module, name, None)
    if callable(function):
        return function
    own = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    what = "no function" if function is None else "no function, but another object,"
    there = f"Its functions: {', '.join(own)}." if own else "It has no functions."
    raise Refusal(f"{module_name} has {what} {name!r}. {there}", exit_code=2)


def _accepts_seed(function: Callable, called: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in variadic and p.name != "seed"
    ]
    if required:
        raise Refusal(
            f"{called} needs the arguments {', '.join(required)}; it must take none, "
            "or only `seed`.",
            exit_code=2,
        )
    return any(p.name == "seed" for p in parameters)


def _is_ours(filename: str) -> bool:
    return Path(filename).is_relative_to(_OURS)


def _is_theirs(filename: str) -> bool:
    path = Path(filename)
    installed = {"site-packages", "dist-packages"} & {*path.parts}
    generated = filename.startswith("<")
    known = _is_ours(filename) or path.is_relative_to(_STANDARD)
    return not (installed or generated or known)


def their_traceback(error: BaseException) -> str | None:
    """The traceback of an error, from the first frame in the user's code to the last;
    `None` if there is none."""
    described = traceback.TracebackException.from_exception(error)
    described.__cause__ = described.__context__ = None
    theirs = [i for i, x in enumerate(described.stack) if _is_theirs(x.filename)]
    if not theirs and not isinstance(error, SyntaxError):
        return None
    frames = described.stack[theirs[0] : theirs[-1] + 1] if theirs else []
    described.stack = traceback.StackSummary.from_list(frames)
    return "".join(described.format()).rstrip()


def raised_here(error: BaseException) -> bool:
    """Whether an error was raised in reversax's own code."""
    return _is_ours(traceback.extract_tb(error.__traceback__)[-1].filename)


def _only_message(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).rstrip()
