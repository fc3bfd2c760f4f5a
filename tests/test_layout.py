"""The house rules that a machine can check."""

import ast
import inspect
from pathlib import Path

import pytest

import reversax

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "reversax"
# From the bottom to the top: a module imports only from those before it, and a folder
# from those before it.
ROOMS = {
    "_xla": "__init__ bits compat closure elementwise guard one_kernel programs "
    "rounding batching run_time written residuals isolation",
    "_numbers": "__init__ schedule arithmetic words fixed_point",
    "_schemes": "__init__ control coupling problem stages increment fields kept rows "
    "moves scheme undoing interpolation error_estimate twins vector_fields "
    "native retraced multistep_weights multistep_window multistep_moves "
    "multistep_start multistep_dense multistep own symplectic watch base",
    "": "_solver _symplectic _multistep schemes",
    "_walk": "__init__ beginning clock times stepping timeline tape observe event "
    "setup faults forward certificate cotangents lane backward rule",
    "top": "_adjoint _round_trip __init__",
    "compare": "_scan _search _candidates _problem _gradient _setting _measure "
    "_recommend _load _plot _report _options _command __init__",
    "commands": "__main__",
}
FOLDERS = ("_xla", "_numbers", "_schemes", "_walk", "compare")
ORDER = [
    f"{room}.{name}" if room in FOLDERS else name
    for room, names in ROOMS.items()
    for name in names.split()
]
MODULES = sorted(SOURCE.rglob("*.py"))
FILES = [
    path
    for folder in ("src", "tests", "examples", "benchmarks", "pytorch")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def by_name(path):
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def imported(path, node):
    """The modules of ours that a relative import names."""
    *package, _ = by_name(path).split(".")
    package = package[: len(package) + 1 - node.level]
    if node.module is not None:
        return [".".join([*package, node.module])]
    modules = [".".join([*package, alias.name]) for alias in node.names]
    return [x if x in ORDER else ".".join([*package, "__init__"]) for x in modules]


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_imports_only_point_down(path):
    below = ORDER[: ORDER.index(by_name(path))]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            for module in imported(path, node):
                assert module in below, module


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_private_upstream_names_are_imported_in_compat_only(path):
    if by_name(path) == "_xla.compat":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            assert not any(part.startswith("_") for part in node.module.split("."))
            assert not node.module.startswith("equinox.internal")
        if isinstance(node, ast.Import):
            assert not any(a.name.startswith("equinox.internal") for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short_enough_to_read(path):
    text = path.read_text()
    assert text.count("\n") < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno
            assert lines < 60, (node.name, lines)


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_classes_are_short_and_values_are_handed_on_by_name(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 150, node.name
        spread = (
            [x for x in getattr(node, "args", []) if isinstance(x, ast.Starred)]
            if isinstance(node, ast.Call)
            else []
        )
        for star in spread:
            values = getattr(star.value, "elts", [])
            assert len(values) <= 4, ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_no_closure_is_nested_three_deep(path):
    def depth(node):
        own = isinstance(node, ast.FunctionDef)
        return own + max((depth(c) for c in ast.iter_child_nodes(node)), default=0)

    assert depth(ast.parse(path.read_text())) <= 2


PUBLIC = [
    getattr(reversax, name)
    for name in vars(reversax)
    if not name.startswith("_") and hasattr(getattr(reversax, name), "__module__")
]


@pytest.mark.parametrize("obj", PUBLIC, ids=lambda obj: obj.__name__)
def test_public_names_say_what_they_are(obj):
    doc = inspect.getdoc(obj)
    assert doc is not None
    first_line = doc.splitlines()[0]
    assert len(first_line) > 20
    if isinstance(obj, type):
        for name, method in vars(obj).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                assert inspect.getdoc(getattr(obj, name)), f"{obj.__name__}.{name}"


IMPERATIVES = {
    *("Apply", "Call", "Cast", "Convert", "Differentiate", "Enable", "Give", "Have"),
    *("Keep", "Leave", "Make", "Pass", "Rescale", "Resume", "Use", "Write", "{wrap};"),
}


def text_of(node):
    """A string as it is written, with its placeholders."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if is_text else ""


def messages_of(path):
    """Those of the exceptions that a module raises, and of its checks at run time."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if ast.unparse(node.exc.func) == "AssertionError":
                continue
            yield from filter(None, map(text_of, node.exc.args))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper():
            text = text_of(node.value)
            if text.count(" ") > 8:
                yield text


MESSAGES = [
    pytest.param(text, id=f"{by_name(path)}-{i}")
    for path in MODULES
    if path.parent.name != "compare" and path.stem != "__main__"
    for i, text in enumerate(messages_of(path))
]


@pytest.mark.parametrize("text", MESSAGES)
def test_a_message_says_first_what_to_do_and_little_more(text):
    assert text.split()[0] in IMPERATIVES
    ends = text.count(". ") + text.count("? ") + text.endswith(".")
    assert 1 <= ends <= 4
