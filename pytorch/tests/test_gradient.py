"""Gradients are those of the discrete solve."""

import functools
import itertools

import pytest
import torch
import torchdiffeq
from helpers import ADAPTIVE, FIXED, Network, gradients, relative, reversible, start
from reversax_torch import odeint

# The reconstruction is exact, so what is left is the round-off of cotangents.
ROUND_OFF = 1e-12


def inputs(field, t_grad=True):
    y0 = start().requires_grad_()
    t = torch.linspace(0.0, 1.0, 5, dtype=torch.float64, requires_grad=t_grad)
    return y0, t, [y0, *([t] if t_grad else []), *field.parameters()]


@pytest.mark.parametrize("damping", [0.0, 5.0])
@pytest.mark.parametrize("method", FIXED + ADAPTIVE)
def test_gradient_is_backpropagation_through_the_same_steps(method, damping):
    field = Network(damping=damping)
    y0, t, wanted = inputs(field)
    shares = torch.linspace(0, 1, 17, dtype=torch.float64)
    grid = {"grid_constructor": lambda f, y, t: shares * t[-1] + t[0]}
    ours = gradients(lambda: odeint(field, y0, t, method=method, options=grid), *wanted)

    def by_hand():
        times = shares * t[-1] + t[0]
        _, inside = reversible(method, field, y0, times, [4] * 16, [*t[1:-1]])
        ends, _ = reversible(method, field, y0, times, [4] * 16)
        return torch.stack([y0, *inside, ends[-1]])

    theirs = gradients(by_hand, *wanted)
    assert relative(ours, theirs) < ROUND_OFF


@pytest.mark.parametrize("method", FIXED)
def test_gradient_where_steps_end_at_the_times_asked_for(method):
    field = Network()
    y0, t, wanted = inputs(field)
    ours = gradients(lambda: odeint(field, y0, t, method=method), *wanted)
    by_hand = lambda: reversible(method, field, y0, t, [4] * 4)[0]
    assert relative(ours, gradients(by_hand, *wanted)) < ROUND_OFF


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradient_of_steps_that_adapt(method, sign):
    field = Network(damping=1.0)
    y0, t, wanted = inputs(field)
    solve = lambda: odeint(field, y0, sign * t, method=method, rtol=1e-5, atol=1e-6)
    ys = solve()
    walk = ys.grad_fn.walk
    lengths = torch.tensor(walk.times[:-1], dtype=torch.float64)

    def by_hand():
        times = torch.cat([sign * t[0] + lengths, sign * t[-1:]])
        asked = [*(sign * t[1:-1])]
        ends, inside = reversible(method, field, y0, times, walk.halvings, asked)
        return torch.stack([y0, *inside, ends[-1]])

    assert len(walk.times) >= 3
    assert torch.allclose(ys, by_hand(), rtol=0, atol=1e-13)
    assert relative(gradients(solve, *wanted), gradients(by_hand, *wanted)) < ROUND_OFF


def test_gradient_of_a_tuple():
    field = Network()
    y0, t, wanted = inputs(field)
    parameters = tuple(field.parameters())

    def both(t, state):
        y, _ = state
        return field(t, y), y.pow(2).sum(dim=1)

    solve = lambda fn, **more: fn(
        both, (y0, y0[:, 0] * 0), t, rtol=1e-9, atol=1e-10, **more
    )
    ours = gradients(lambda: solve(odeint, adjoint_params=parameters), *wanted)
    theirs = gradients(lambda: solve(torchdiffeq.odeint), *wanted)
    # Of another solver: as near as the solutions are.
    assert relative(ours, theirs) < 1e-6


def test_gradient_with_respect_to_times_is_the_slope():
    """By finite differences: steps that adapt are others then, so theirs are fixed."""
    field, y0 = Network(), start(batch=1)
    t = torch.tensor([0.1, 0.45, 0.72, 1.0], dtype=torch.float64, requires_grad=True)
    solve = lambda t: odeint(field, y0, t, method="bosh3", options={"num_steps": 4})
    assert torch.autograd.gradcheck(solve, (t,), eps=1e-5, atol=1e-8)


@functools.cache
def damped_truth():
    field, y0 = Network(damping=5.0, width=16), start().requires_grad_()
    t, tight = torch.tensor([0.0, 4.0]).double(), dict(rtol=1e-11, atol=1e-13)
    solve = lambda: torchdiffeq.odeint(field, y0, t, **tight)[-1]
    return gradients(solve, y0, *field.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damped_problem_is_exact_where_odeint_adjoint_fails(dtype):
    truth, field = damped_truth(), Network(damping=5.0, width=16, dtype=dtype)
    y0, t = start().to(dtype).requires_grad_(), torch.tensor([0.0, 4.0], dtype=dtype)
    wanted = [y0, *field.parameters()]
    fine = dict(rtol=1e-7, atol=1e-8)
    ours = gradients(lambda: odeint(field, y0, t, **fine)[-1], *wanted)
    # That of `y0`, which the flow contracts by exp(-20), is hardest.
    assert relative(ours, truth) < 1e-5
    adjoint = torchdiffeq.odeint_adjoint
    theirs = gradients(lambda: adjoint(field, y0, t, **fine)[-1], *wanted)
    assert relative(theirs, truth) > 0.01


def test_published_coupling_has_the_gradient_of_its_own_steps():
    field = Network()
    y0, t, wanted = inputs(field, t_grad=False)
    options = {"coupling": "mccallum-foster", "coupling_parameter": 0.9}
    ours = gradients(
        lambda: odeint(field, y0, t, method="midpoint", options=options), *wanted
    )

    def by_hand():
        y = z = y0
        out = [y0]
        midpoint = lambda t, h, y: h * field(t + h / 2, y + h / 2 * field(t, y))
        for t0, t1 in itertools.pairwise(t):
            y = 0.9 * y + 0.1 * z + midpoint(t0, t1 - t0, z)
            z = z - midpoint(t1, t0 - t1, y)
            out.append(y)
        return torch.stack(out)

    # Undoing a step magnifies round-off.
    assert relative(ours, gradients(by_hand, *wanted)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_a_gradient_near_that_of_single(dtype):
    field = Network(dtype=dtype)
    y0, t = start(dtype).requires_grad_(), torch.linspace(0, 1, 9)
    wanted = [y0, *field.parameters()]
    ours = gradients(lambda: odeint(field, y0, t, method="heun2"), *wanted)
    single = Network(dtype=torch.float32)
    single.load_state_dict({k: v.float() for k, v in field.state_dict().items()})
    x0 = y0.detach().float().requires_grad_()
    fine = [x0, *single.parameters()]
    truth = gradients(lambda: odeint(single, x0, t, method="heun2"), *fine)
    assert all(g.dtype == dtype for g in ours)
    # Eight bits, or eleven, over eight steps.
    assert relative([g.float() for g in ours], truth) < 20 * torch.finfo(dtype).eps


def test_only_what_needs_a_gradient_gets_one():
    field, y0, t = Network(), start(), torch.linspace(0, 1, 3).double()
    first, *others = field.parameters()
    for p in others:
        p.requires_grad_(False)
    odeint(field, y0, t).sum().backward()
    assert first.grad is not None and all(p.grad is None for p in others)
    assert not odeint(field.requires_grad_(False), y0, t).requires_grad


def test_a_field_without_dependence_on_the_state_has_a_gradient():
    y0 = start().requires_grad_()
    t = torch.linspace(0.0, 1.0, 3, dtype=torch.float64, requires_grad=True)
    solve = lambda: odeint(lambda t, y: torch.ones_like(y), y0, t, method="rk4")
    weights = torch.linspace(-1, 2, 36, dtype=torch.float64).reshape(3, 4, 3)
    expected = weights * solve().detach().cos()
    by_y0, by_t = gradients(solve, y0, t)
    assert torch.allclose(by_y0, expected.sum(dim=0), atol=1e-12)
    slope = expected.sum(dim=(1, 2))
    slope[0] -= expected.sum()
    assert torch.allclose(by_t, slope, atol=1e-12)
