"""The documentation: its programs run, and no public name is missing.

That its links and references lead somewhere, `mkdocs build --strict` checks (.ci/run).
"""

import ast
import inspect
import re
import textwrap
import tomllib
from pathlib import Path

import jax
import pytest

import reversax
import reversax.compare

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCED = re.compile(r"^( *)```python\n(.*?)\n\1```$", re.MULTILINE | re.DOTALL)


def programs_of(page):
    """The blocks of Python of a page, each with its lines where they are in the page.
    (What comes from `examples/`, which test_examples.py runs, is fenced otherwise.)"""
    text = page.read_text()
    lines_before = lambda found: text[: found.start(2)].count("\n")
    return [
        "\n" * lines_before(found) + textwrap.dedent(found[2])
        for found in FENCED.finditer(text)
    ]


def imports_of(source):
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
by_path = lambda page: str(page.relative_to(ROOT))
# Where programs take long to compile: 5 to 31 s each of processor time.
LONG = {
    "docs/getting_started.md",
    "docs/ends_of_steps.md",
    "docs/faq.md",
    "docs/migrating/diffrax.md",
    "docs/migrating/torchdiffeq.md",
    "docs/migrating/torchsde.md",
}


def page_to_run(page):
    marks = [pytest.mark.heavy] if by_path(page) in LONG else []
    return pytest.param(page, id=by_path(page), marks=marks)


WITH_PROGRAMS = [page for page in PAGES if programs_of(page)]
# For several devices and processes, which test_devices.py makes.
IN_ONE_PROCESS = [p for p in WITH_PROGRAMS if by_path(p) != "docs/devices.md"]


@pytest.mark.parametrize("page", [page_to_run(page) for page in IN_ONE_PROCESS])
def test_programs_of_a_page_run_one_after_the_other(page):
    """As a reader would run them, in single precision. Those for PyTorch, which is not
    installed for the tests, are compiled only."""
    namespace = {}
    for source in programs_of(page):
        program = compile(source, str(page), "exec")
        if "torch" not in imports_of(source):
            with jax.enable_x64(False):
                exec(program, namespace)
    assert namespace


@pytest.mark.parametrize("page", WITH_PROGRAMS, ids=by_path)
def test_programs_of_a_page_compile(page):
    for source in programs_of(page):
        compile(source, str(page), "exec")


def test_readme_and_the_pages_for_every_user_have_programs():
    names = {by_path(page) for page in WITH_PROGRAMS}
    assert LONG | {"README.md"} <= names


def test_every_install_command_is_one_for_a_checkout_and_of_extras_that_there_are():
    """There is no package of this name to download."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    code = [*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    texts = [page.read_text() for page in [*PAGES, *code]]
    commands = [
        x for text in texts for x in re.findall(r"pip install (\S.*?[']|\S+)", text)
    ]
    own = [x for x in commands if "[" in x]
    assert len(own) >= 7
    for command in own:
        named = re.fullmatch(r"'\.\[([a-z,]+)\]'", command)
        assert named, command
        assert {*named[1].split(",")} <= {*extras["optional-dependencies"]}
    assert not [x for x in commands if x.startswith(("reversax", "'reversax"))]


def test_every_public_name_has_an_entry_and_every_entry_is_public():
    public = [
        f"{module.__name__}.{name}"
        for module in (reversax, reversax.compare)
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    text = (DOCS / "api.md").read_text()
    entries = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert sorted(entries) == sorted(public)
