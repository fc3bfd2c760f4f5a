"""The examples run from end to end, as a reader would run them."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

from matplotlib.image import imread

EXAMPLES = Path(__file__).parents[1] / "examples"


def assert_shows_something(figure: Path) -> None:
    pixels = imread(figure)
    height, width, _ = pixels.shape
    assert min(height, width) > 300
    assert pixels[..., :3].std() > 0.05, "the figure is nearly blank"


def test_lynx_hare_runs_checks_its_gradient_and_draws_both_figures(tmp_path):
    # Unoptimised programs are compiled in less time, and hardly run here.
    env = dict(os.environ, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    script = EXAMPLES / "lynx_hare.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--out", str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"relative difference (\S+) \(bound (\S+)\)", done.stdout)
    assert found is not None, done.stdout
    difference, bound = map(float, found.groups())
    assert 0 < bound <= 1e-8
    assert difference <= bound
    assert_shows_something(tmp_path / "lynx_hare_fit.png")
    assert_shows_something(tmp_path / "lynx_hare_memory.png")


def test_lynx_hare_data_are_positive_pelts_of_both_species_for_1900_to_1920():
    with (EXAMPLES / "data" / "lynx_hare.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [int(row["year"]) for row in rows] == list(range(1900, 1921))
    assert all(float(row[species]) > 0 for row in rows for species in ("hare", "lynx"))
