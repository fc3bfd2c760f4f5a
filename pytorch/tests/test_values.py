"""What a solve returns: torchdiffeq's values, and the orders of the scheme."""

import math

import pytest
import torch
import torchdiffeq
from helpers import ADAPTIVE, FIXED, Network, psi, stages, start
from reversax_torch import odeint, odeint_adjoint
from reversax_torch._steps import BASES

T = torch.linspace(0.0, 2.0, 7, dtype=torch.float64)


def rotation(t, y):
    """`y = (cos, sin)(t**2/2)`."""
    return t * torch.stack([-y[1], y[0]])


def error_of_rotation(method, n, asked):
    t = torch.tensor([0.0, *asked], dtype=torch.float64)
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    ys = odeint(rotation, y0, t, method=method, options={"num_steps": n})
    exact = torch.stack([torch.cos(t**2 / 2), torch.sin(t**2 / 2)], dim=1)
    return (ys - exact).abs().amax(dim=1)


# Steps that are neither so long that the order does not show, nor so short that
# round-off does.
COARSE = {"dopri8": 6, "dopri5": 12, "tsit5": 12}


@pytest.mark.parametrize("method", BASES)
def test_solution_gains_an_order_at_the_end_of_steps_if_that_of_the_base_is_odd(method):
    n, base = COARSE.get(method, 40), BASES[method].order
    coarse, fine = (error_of_rotation(method, k, [2.0])[-1] for k in (n, 2 * n))
    assert abs(math.log2(coarse / fine) - (base + base % 2)) < 0.4


@pytest.mark.parametrize("method", BASES)
def test_solution_within_steps_has_the_order_of_the_base(method):
    n, base = COARSE.get(method, 40), BASES[method].order
    # Within steps of either solve, at about the same share of them.
    h = 2.0 / n
    times = lambda h: [1 + h / 3, 1 + 4 * h / 3, 2.0]
    coarse = error_of_rotation(method, n, times(h))[1:-1].max()
    fine = error_of_rotation(method, 2 * n, times(h / 2))[1:-1].max()
    assert math.log2(coarse / fine) > base - 0.3


@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_agree_with_torchdiffeq(method):
    field, y0 = Network(), start()
    keywords = dict(method=method, options={"step_size": 0.01})
    ours = odeint(field, y0, T, **keywords).detach()
    theirs = torchdiffeq.odeint(field, y0, T, **keywords).detach()
    exact = torchdiffeq.odeint(field, y0, T, rtol=1e-11, atol=1e-12).detach()
    error = (theirs - exact).abs().max()
    # Of the same order or one more: never worse than a small factor.
    assert (ours - exact).abs().max() < 4 * error + 1e-11


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8"])
@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
def test_steps_that_adapt_agree_with_torchdiffeq_within_the_tolerance(method, rtol):
    field, y0 = Network(), start()
    keywords = dict(method=method, rtol=rtol, atol=rtol / 100)
    ours = odeint(field, y0, T, **keywords)
    theirs = torchdiffeq.odeint(field, y0, T, **keywords)
    exact = torchdiffeq.odeint(field, y0, T, rtol=1e-12, atol=1e-13)
    error, errors = (ours - exact).abs(), (theirs - exact).abs()
    # That of a step, over some steps. Theirs is up to 40 rtol with bosh3, 300 with
    # dopri8, between whose long steps they interpolate by a quartic.
    assert (error < 10 * rtol * (1 + exact.abs())).all()
    assert error.max() < 2 * errors.max()


@pytest.mark.parametrize("method", ADAPTIVE)
def test_defaults_in_single_precision_agree_with_double(method):
    field, y0 = Network(dtype=torch.float32), start(torch.float32)
    ys = odeint(field, y0, T.float(), method=method)
    exact = torchdiffeq.odeint(field.double(), y0.double(), T, rtol=1e-10, atol=1e-10)
    assert (ys - exact).abs().max() < 3e-6


def test_decreasing_times_undo_increasing_ones():
    field, y0 = Network(), start()
    there = odeint(field, y0, T)
    back = odeint(field, there[-1], T.flip(0)).flip(0)
    assert (there - back).abs().max() < 1e-6
    tight = dict(rtol=1e-11, atol=1e-12)
    theirs = torchdiffeq.odeint(field, there[-1], T.flip(0), **tight).flip(0)
    assert (theirs - back).abs().max() < 1e-6


def test_a_tuple_is_solved_as_its_tensors_would_be_together():
    field, y0 = Network(), start()

    def both(t, state):
        y, _ = state
        return field(t, y), y.pow(2).sum(dim=1)

    state = (y0, torch.zeros(4, dtype=torch.float64))
    keywords = dict(rtol=(1e-8, 1e-6), atol=(1e-10, 1e-8))
    parameters = tuple(field.parameters())
    ours = odeint(both, state, T, adjoint_params=parameters, **keywords)
    theirs = torchdiffeq.odeint(both, state, T, **keywords)
    assert isinstance(ours, tuple)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() < 1e-6


def test_each_way_to_say_where_fixed_steps_end_says_the_same():
    field, y0 = Network(), start()
    t = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
    solve = lambda options, method="rk4": odeint(
        field, y0, t, method=method, options=options
    ).detach()
    expected = solve(None)
    ways = [
        {"num_steps": 8},
        {"step_size": 1 / 8},
        {"grid_constructor": lambda f, y, t: t},
    ]
    for options in ways:
        assert torch.allclose(solve(options), expected, rtol=0, atol=1e-14)
    assert not torch.equal(solve({"step_size": 0.3}), expected)
    assert torch.isfinite(solve({"num_steps": 8}, "bosh3")).all()


def test_steps_of_the_last_size_are_none_that_round_off_leaves_over():
    calls = []
    field = lambda t, y: calls.append(1) or -y
    t = torch.linspace(0.0, 1.0, 2)
    odeint(field, torch.ones(1), t, method="euler", options={"step_size": 0.1})
    assert len(calls) == 20


def test_adjoint_takes_what_torchdiffeq_takes_and_returns_the_same():
    field, y0 = Network(), start()
    ours = odeint_adjoint(
        field, y0, T, adjoint_rtol=1e-3, adjoint_options={"norm": "seminorm"}
    )
    assert torch.equal(ours, odeint(field, y0, T))


def test_norm_and_bounds_of_steps_are_heeded():
    y0, t = torch.ones(2, dtype=torch.float64), T[[0, -1]]
    lengths = []

    def count(options, field=lambda t, y: -y):
        lengths.clear()
        calls = lambda t, y: lengths.append(float(t)) or field(t, y)
        odeint(calls, y0, t, options=options, rtol=1e-5, atol=1e-6)
        return len(lengths)

    assert count({"max_step": 0.01}) >= 200 * 12
    assert count({"norm": lambda y: 1e3 * y.abs().max()}) > count({})
    count({"step_t": torch.tensor([0.7], dtype=torch.float64)})
    assert 0.7 in lengths
    count({})
    assert 0.7 not in lengths


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_controller_is_told_of_the_estimate_of_the_base_and_of_the_gap(method):
    field, y0, base, h, seen = Network(), start(), BASES[method], 0.3, []
    norm = lambda error: seen.append(error) or error.abs().max()
    options = {"first_step": h, "norm": norm}
    odeint(field, y0, T[:2], method=method, rtol=0.0, atol=1.0, options=options)
    t0, t1 = torch.tensor([0.0, h], dtype=torch.float64)
    up = psi(base, field, t0, h, y0)
    down = psi(base, field, t1, -h, y0 + up)
    ks = [*stages(base, field, t0, h, y0), field(t1, y0 + up)]
    u = h * sum(w * k for w, k in zip(base.error, ks, strict=False)).abs()
    e = (up + down).abs()
    # Four halvings, the most, since most of the time passes.
    expected = u + 2.5 * (u * e).sqrt() + e / 16
    assert torch.allclose(seen[0], expected, rtol=1e-3, atol=1e-15)


def test_one_time_returns_the_initial_state():
    y0 = start()
    assert torch.equal(odeint(Network(), y0, T[:1]), y0[None])
