"""The examples run from end to end, as a reader would run them."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from solar_data import GRAVITY, load_seen

EXAMPLES = Path(__file__).parents[1] / "examples"


def assert_shows_something(figure: Path) -> None:
    pixels = imread(figure)
    height, width, _ = pixels.shape
    assert min(height, width) > 300
    assert pixels[..., :3].std() > 0.05, "the figure is nearly blank"


def run_quickly(name, folder):
    """What an example prints in its smallest setting."""
    # Unoptimised programs are compiled in less time, and hardly run here.
    env = dict(os.environ, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--quick", "--out", str(folder)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_gradients_agree(printed, largest_bound):
    found = re.search(r"relative difference (\S+) \(bound (\S+)\)", printed)
    assert found is not None, printed
    difference, bound = map(float, found.groups())
    assert 0 < bound <= largest_bound
    assert difference <= bound


def test_lynx_hare_runs_checks_its_gradient_and_draws_both_figures(tmp_path):
    assert_gradients_agree(run_quickly("lynx_hare.py", tmp_path), 1e-8)
    assert_shows_something(tmp_path / "lynx_hare_fit.png")
    assert_shows_something(tmp_path / "lynx_hare_memory.png")


@pytest.mark.heavy
def test_rabi_turns_a_quantum_system_as_the_area_of_its_pulse_says(tmp_path):
    printed = run_quickly("rabi.py", tmp_path)
    assert_gradients_agree(printed, 1e-9)
    found = re.search(
        r"probability (\S+), by the rotating wave (\S+); norm within (\S+) of",
        printed,
    )
    assert found is not None, printed
    probability, expected, norm = map(float, found.groups())
    # Of the order of drive over carrier, squared, and of 1,536 steps.
    assert abs(probability - expected) <= 1e-4
    assert norm <= 2e-5
    assert_shows_something(tmp_path / "rabi.png")


@pytest.mark.heavy
def test_reaction_diffusion_undoes_a_damped_equation_to_the_bit(tmp_path):
    printed = run_quickly("reaction_diffusion.py", tmp_path)
    assert_gradients_agree(printed, 1e-5)  # In single precision; measured 4e-7.
    assert "by 0.0e+00 with the symmetric one" in printed
    assert re.search(r"^Coefficients: worst error \S+ %", printed, re.MULTILINE)
    assert_shows_something(tmp_path / "reaction_diffusion_fields.png")
    assert_shows_something(tmp_path / "reaction_diffusion_memory.png")


@pytest.mark.heavy
def test_japanese_vowels_checks_its_gradient_and_counts_what_it_gets_right(tmp_path):
    printed = run_quickly("japanese_vowels.py", tmp_path)
    assert_gradients_agree(printed, 1e-5)  # In single precision; measured 6e-7.
    assert re.search(r"^Test accuracy: .*mean 0\.\d", printed, re.MULTILINE)
    assert_shows_something(tmp_path / "japanese_vowels_scores.png")
    assert_shows_something(tmp_path / "japanese_vowels_memory.png")


@pytest.mark.heavy
def test_continuous_flow_checks_its_gradient_and_scores_both_densities(tmp_path):
    printed = run_quickly("continuous_flow.py", tmp_path)
    assert_gradients_agree(printed, 1e-4)  # In single precision; measured 1e-6.
    for density in ("spirals", "digits"):
        score = rf"^Held-out log-likelihood, {density}: flow -?\d.*mixture -?\d"
        assert re.search(score, printed, re.MULTILINE)
    for figure in ("density", "digits", "memory"):
        assert_shows_something(tmp_path / f"flow_{figure}.png")


@pytest.mark.heavy
def test_power_demand_checks_its_gradient_and_scores_its_days_against_others(tmp_path):
    printed = run_quickly("power_demand.py", tmp_path)
    assert_gradients_agree(printed, 1e-4)  # In single precision; measured 2e-6.
    scores = r"^Held-out energy distance: neural SDE.*Ornstein-Uhlenbeck.*AR\("
    assert re.search(scores, printed, re.MULTILINE)
    assert re.search(r"neural SDE.* \d+ %", printed), "how often a forest is right"
    assert_shows_something(tmp_path / "power_demand_days.png")
    assert_shows_something(tmp_path / "power_demand_memory.png")


@pytest.mark.heavy
def test_many_devices_find_the_gradients_of_one_and_undo_to_the_bit(tmp_path):
    printed = run_quickly("many_devices.py", tmp_path)
    # In single precision, of sums in another order, which may come out alike.
    differences = re.findall(r"relative difference (\S+) \(bound", printed)
    assert len(differences) == 2
    assert all(float(difference) <= 1e-4 for difference in differences)
    round_trips = re.findall(r"^│ (?:one|8) device[^│]*│[^│]*│([^│]*)│", printed, re.M)
    assert len(round_trips) == 5
    assert all(float(error) == 0 for error in round_trips)
    assert_shows_something(tmp_path / "many_devices_training.png")
    assert_shows_something(tmp_path / "many_devices_state.png")


@pytest.mark.heavy
def test_solar_system_weighs_two_planets_and_turns_round_to_the_bit(tmp_path):
    printed = run_quickly("solar_system.py", tmp_path)
    assert_gradients_agree(printed, 1e-9)
    for planet in ("Jupiter", "Saturn"):
        found = re.search(rf"^│ +{planet} │.*│ +(\S+) % │$", printed, re.MULTILINE)
        assert found is not None, printed
        # From 30 %; what is left is the error of Verlet's steps of 12 days.
        assert 0 < abs(float(found[1])) <= 1
    energy = re.search(r"^Energy within (\S+) of .* back, (\S+) ", printed, re.M)
    assert energy is not None, printed
    assert 0 < float(energy[1]) <= 1e-4  # (h * angular velocity of Jupiter)**2 / 8
    assert float(energy[2]) == 0
    assert_shows_something(tmp_path / "solar_system_orbits.png")
    assert_shows_something(tmp_path / "solar_system_memory.png")


@pytest.mark.heavy
def test_hamiltonian_keeps_the_energy_of_any_potential_learned(tmp_path):
    printed = run_quickly("hamiltonian.py", tmp_path)
    own = re.search(r"first tenth .* of its own Hamiltonian (\S+)$", printed, re.M)
    assert own is not None, printed
    # As large at any time as in the first steps, of the order of (1/8)**2 / 8; the
    # potential need not be the true one for it.
    assert 0 < float(own[1]) <= 1e-2
    assert re.search(r"^Energy, vector field: largest relative error \d", printed, re.M)
    assert_shows_something(tmp_path / "hamiltonian.png")


def test_outer_planets_are_seen_every_400_days_on_orbits_of_their_sizes():
    seen = load_seen()
    assert seen.days.tolist() == list(range(0, 51_201, 400))
    distance = np.linalg.norm(seen.positions, axis=-1)
    speed = np.linalg.norm(seen.velocities, axis=-1)
    axis = 1 / (2 / distance - speed**2 / GRAVITY)
    # What other planets add to an ellipse about the Sun, for a body seen from there.
    expected = np.array([5.203, 9.537, 19.189, 30.070])
    np.testing.assert_allclose(axis, np.broadcast_to(expected, axis.shape), rtol=0.02)


def test_lynx_hare_data_are_positive_pelts_of_both_species_for_1900_to_1920():
    with (EXAMPLES / "data" / "lynx_hare.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [int(row["year"]) for row in rows] == list(range(1900, 1921))
    assert all(float(row[species]) > 0 for row in rows for species in ("hare", "lynx"))
