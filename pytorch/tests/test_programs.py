"""Examples, benchmarks and what the README shows run."""

import re
from pathlib import Path

import controlled
import flow
import torch_device

README = Path(__file__).parents[1] / "README.md"


def test_a_flow_learns_the_same_with_either_package(tmp_path):
    few = ["--iterations", "3", "--batch", "16", "--width", "4"]
    found = flow.main([*few, "--figure", str(tmp_path / "flow.png")])
    first, second = found.values()
    # To what the solves are off.
    assert abs(first - second) < 1e-3
    assert (tmp_path / "flow.png").stat().st_size > 10_000


def test_a_controlled_equation_of_torchcde_has_its_gradient():
    ours, adjoint = controlled.main().values()
    assert ours < 1e-4
    assert ours < 0.1 * adjoint


def test_bits_are_the_same_on_this_device(capsys):
    torch_device.main(["--quick", "--device", "cpu"])
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| ")]
    found = [row for row in rows if row.endswith("| exact | exact |")]
    assert len(found) == 4 * 3


def test_programs_of_the_readme_run_one_after_the_other():
    programs = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert programs
    namespace = {}
    for program in programs:
        exec(compile(program, str(README), "exec"), namespace)
