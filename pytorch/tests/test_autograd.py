"""What PyTorch does with functions it differentiates."""

import gc
import weakref

import pytest
import torch
from helpers import Network, gradients, relative, start
from reversax_torch import odeint
from torch import nn

T = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
FEW = dict(method="bosh3", options={"num_steps": 8})


class Model(nn.Module):
    """With a solve within."""

    def __init__(self):
        super().__init__()
        self.field = Network()

    def forward(self, y0):
        return odeint(self.field, y0, T, **FEW)[-1].pow(2).sum()


def reference():
    model, y0 = Model(), start().requires_grad_()
    return model, y0, torch.autograd.grad(model(y0), [y0, *model.parameters()])


def test_hooks_are_called_once_on_the_whole_gradient():
    model, y0, (_, expected, *_) = reference()
    seen, accumulated = [], []
    weight = next(model.parameters())
    weight.register_hook(lambda g: seen.append(g) or 2 * g)
    weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(1))
    model(y0).backward()
    assert len(seen) == len(accumulated) == 1
    assert torch.equal(seen[0], expected)
    assert weight.grad is not None and torch.equal(weight.grad, 2 * expected)


def test_hooks_on_what_a_function_reads_are_refused():
    """There autograd would call them at each step."""
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()
    weight.register_hook(lambda g: 2 * g)
    field = lambda t, y: (y @ weight).tanh()
    ys = odeint(field, start(), T, adjoint_params=(weight,), **FEW)
    with pytest.raises(NotImplementedError, match=r"^Pass the module"):
        ys.sum().backward()


def test_a_graph_may_be_gone_through_twice():
    model, y0, expected = reference()
    loss, wanted = model(y0), [y0, *model.parameters()]
    for _ in range(2):
        found = torch.autograd.grad(loss, wanted, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_a_solve_keeps_dies_with_its_graph():
    gc.collect()
    gc.disable()
    try:
        ys = odeint(Network(), start(), T, **FEW)
        kept = [weakref.ref(ys), weakref.ref(ys.grad_fn.walk)]
        ys.sum().backward()
        del ys
        assert [x() for x in kept] == [None, None]
    finally:
        gc.enable()


def test_without_gradients_values_are_the_same_and_nothing_is_kept():
    model, y0, _ = reference()
    with torch.no_grad():
        ys = odeint(model.field, y0, T, **FEW)
    assert not ys.requires_grad
    with torch.inference_mode():
        again = odeint(model.field, y0, T, **FEW)
    assert torch.equal(ys, again)
    assert torch.equal(ys, odeint(model.field, y0, T, **FEW).detach())


def test_no_random_numbers_are_drawn():
    model, y0, _ = reference()
    before = torch.get_rng_state()
    model(y0).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_second_derivatives_are_refused_where_they_are_asked_for():
    model, y0, (expected, *_) = reference()
    (slope,) = torch.autograd.grad(model(y0), y0, create_graph=True)
    assert torch.equal(slope, expected)
    with pytest.raises(NotImplementedError, match=r"^Differentiate once"):
        slope.sum().backward()


# PyTorch itself compiles a decomposition of its forward mode.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused():
    model, y0, _ = reference()
    with pytest.raises(NotImplementedError, match=r"^Use reverse mode"):
        torch.func.jvp(model, (y0.detach(),), (y0.detach(),))
    with pytest.raises(NotImplementedError, match=r"^Use reverse mode"):
        torch.func.hessian(model)(y0.detach())


def test_func_grad_of_the_state_and_of_parameters():
    model, y0, expected = reference()
    y0 = y0.detach()
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    loss = lambda p, y: torch.func.functional_call(model, p, (y,))
    by_parameters, by_y0 = torch.func.grad(loss, argnums=(0, 1))(parameters, y0)
    assert relative([by_y0, *by_parameters.values()], expected) < 1e-15


def test_functional_call_with_other_values_has_their_gradient():
    model, y0, _ = reference()
    others = {k: v.detach() * 1.5 for k, v in model.named_parameters()}
    found = torch.func.grad(
        lambda p: torch.func.functional_call(model, p, (y0.detach(),))
    )(others)
    model.load_state_dict(others)
    expected = torch.autograd.grad(model(y0), list(model.parameters()))
    assert relative(found.values(), expected) < 1e-15


def test_vmap_and_its_gradients_are_those_of_the_batch():
    model, y0, _ = reference()
    ys = odeint(model.field, y0, T, **FEW)
    solve = lambda y: odeint(model.field, y, T, **FEW)
    assert torch.allclose(torch.vmap(solve, out_dims=1)(y0), ys, rtol=0, atol=1e-14)
    y0 = y0.detach()
    loss = lambda y: solve(y)[-1].pow(2).sum()
    (expected,) = gradients_of_sum(lambda x: loss(x), y0)
    found = torch.vmap(torch.func.grad(loss))(y0)
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    x0 = y0.clone().requires_grad_()
    wanted = [x0, *model.parameters()]
    outside = torch.autograd.grad(torch.vmap(loss)(x0).sum(), wanted)
    assert relative(outside, torch.autograd.grad(loss(x0), wanted)) < 1e-14


def gradients_of_sum(loss, y0):
    x0 = y0.clone().requires_grad_()
    return torch.autograd.grad(loss(x0), x0)


def test_jacrev_is_the_jacobian():
    model, y0, _ = reference()
    last = lambda y: odeint(model.field, y, T, **FEW)[-1]
    x0 = y0.detach()[0]
    expected = torch.autograd.functional.jacobian(last, x0)
    assert torch.allclose(torch.func.jacrev(last)(x0), expected, rtol=0, atol=1e-14)


def test_what_vmap_does_not_do_is_refused():
    model, y0, _ = reference()
    y0 = y0.detach()
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    loss = lambda p, y: torch.func.functional_call(model, p, (y,))
    each = torch.func.grad(loss)
    with pytest.raises(NotImplementedError, match=r"^Give the batch a dimension"):
        torch.vmap(each, in_dims=(None, 0))(parameters, y0)
    ensemble = {k: torch.stack([v, v]) for k, v in parameters.items()}
    with pytest.raises(NotImplementedError, match=r"^Give the batch a dimension"):
        torch.vmap(loss, in_dims=(0, None))(ensemble, y0)
    field = model.field

    def closed(p):
        func = lambda t, y: torch.func.functional_call(field, p, (t, y))
        return odeint(func, y0, T, adjoint_params=tuple(p.values()), **FEW).sum()

    own = {k: v.detach() for k, v in field.named_parameters()}
    with pytest.raises(NotImplementedError, match=r"^Pass the module"):
        torch.func.grad(closed)(own)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_field_has_the_same_gradient(backend):
    model, y0, expected = reference()
    model.field = torch.compile(model.field, backend=backend)
    found = torch.autograd.grad(model(y0), [y0, *model.parameters()])
    assert relative(found, expected) < 1e-13
    torch.compiler.reset()


# The compiler looks at the `.grad` of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_model_calls_the_solver_as_it_is():
    model, y0, expected = reference()
    compiled = torch.compile(model, backend="eager")
    found = torch.autograd.grad(compiled(y0), [y0, *model.parameters()])
    assert relative(found, expected) < 1e-13
    torch.compiler.reset()


def test_autocast_is_the_same_in_both_passes():
    """The backward pass is called outside of it, as PyTorch advises."""
    field = Network(width=16, dtype=torch.float32)
    y0, t = start(torch.float32).requires_grad_(), torch.linspace(0, 1, 9)
    wanted = [y0, *field.parameters()]
    dtypes = set()
    field.net[0].register_forward_hook(lambda m, i, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = odeint(field, y0, t, method="midpoint")
    found = torch.autograd.grad(ys.sin().sum(), wanted)
    assert dtypes == {torch.bfloat16} and ys.dtype == torch.float32
    single = odeint(field, y0, t, method="midpoint")
    expected = torch.autograd.grad(single.sin().sum(), wanted)
    # Eight bits.
    assert 1e-4 < relative(found, expected) < 0.05


def test_what_a_field_computed_beforehand_may_be_gone_through_at_each_step():
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()
    matrix = (0.3 * weight).exp()
    field = lambda t, y: (y @ matrix).tanh()
    solve = lambda y: odeint(field, y, T, adjoint_params=(weight,), **FEW)
    (found,) = gradients(lambda: solve(start()), weight)
    step = 1e-6 * torch.ones(3, 3, dtype=torch.float64)

    def loss(w):
        matrix = (0.3 * w).exp()
        ys = odeint(lambda t, y: (y @ matrix).tanh(), start(), T, **FEW)
        weights = torch.linspace(-1, 2, ys.numel(), dtype=ys.dtype).reshape(ys.shape)
        return (weights * ys.sin()).sum()

    with torch.no_grad():
        slope = (loss(weight + step) - loss(weight - step)) / 2e-6
    assert abs(float(found.sum() / slope - 1)) < 1e-7
