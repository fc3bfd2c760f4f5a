"""What is not taken says what to do."""

import functools
from pathlib import Path

import pytest
import reversax_torch
import torch
from helpers import Network, start
from reversax_torch import odeint

T = torch.linspace(0.0, 1.0, 3)
Y0 = start(torch.float32)
FIELD = Network(dtype=torch.float32)
DECAY = lambda t, y: -y

NOT_FINITE = lambda t, y: y / 0 * 0
SQUARE = lambda t, y: 99 * y**2
FAST = lambda t, y: -100 * y
READS = lambda t, y: FIELD(t, y)
GRID = {"grid_constructor": lambda f, y, t: t[1:]}
CALLS_BACK = Network(dtype=torch.float32)
CALLS_BACK.callback_step = print
TOLERANCE = torch.tensor(1e-3).requires_grad_()
PARAMETER = {"coupling": "mccallum-foster", "coupling_parameter": 2}
MANY = torch.linspace(0.0, 1.0, 21)

WRONG = {
    "implicit": (ValueError, "Choose an explicit", dict(method="implicit_adams")),
    "event": (NotImplementedError, "Use `torchdiffeq", dict(event_fn=DECAY)),
    "jump": (ValueError, "Leave out of `options` jump_t", dict(options={"jump_t": 1})),
    "interp": (
        ValueError,
        "Leave out of `options` i",
        dict(options={"interp": 1}),
    ),
    "complex": (TypeError, "Convert the state", dict(y0=Y0 + 0j)),
    "integer": (TypeError, "Convert the state", dict(y0=Y0.int())),
    "list": (TypeError, "Pass `y0`", dict(y0=[Y0])),
    "times of integers": (TypeError, "Pass `t`", dict(t=torch.arange(3))),
    "times of two dimensions": (TypeError, "Pass `t`", dict(t=T[None])),
    "times that turn": (ValueError, "Pass `t`", dict(t=torch.tensor([0.0, 1, 0.5]))),
    "times twice": (ValueError, "Pass `t`", dict(t=torch.tensor([0.0, 1, 1]))),
    "callback": (NotImplementedError, "Delete .callback_step", dict(func=CALLS_BACK)),
    "shape": (ValueError, "Have the field", dict(func=lambda t, y: y.sum())),
    "largest": (ValueError, "Pass a number", dict(options={"largest": -1.0})),
    "halvings": (ValueError, "Pass .auto", dict(options={"halvings_per_step": 0.3})),
    "coupling": (ValueError, "Pass .symmetric", dict(options={"coupling": "none"})),
    "parameter": (ValueError, "Pass a number in", dict(options=PARAMETER)),
    "grid": (ValueError, "Begin the grid", dict(method="rk4", options=GRID)),
    "tolerance": (ValueError, "Detach", dict(rtol=TOLERANCE)),
    "nan": (FloatingPointError, "Pass the", dict(func=NOT_FINITE, method="rk4")),
    "nan, adaptive": (RuntimeError, "Allow larger", dict(func=NOT_FINITE)),
    "explosion": (RuntimeError, "Allow larger", dict(func=SQUARE, y0=Y0.abs())),
    "steps": (RuntimeError, "Allow larger", dict(options={"max_num_steps": 2})),
    "range": (FloatingPointError, "Pass the largest", dict(y0=1e7 * Y0, method="rk4")),
    "damping": (FloatingPointError, "Take", dict(func=FAST, t=MANY, method="euler")),
    "parameters": (ValueError, "Pass `adjoint_params", dict(func=READS)),
}


@pytest.mark.parametrize("name", WRONG)
def test_error_says_what_to_do(name):
    error, text, arguments = WRONG[name]
    arguments = {"func": DECAY, "y0": Y0, "t": T, **arguments}
    with pytest.raises(error, match=f"^{text}"):
        odeint(**arguments)


def test_a_larger_range_takes_what_is_large():
    ys = odeint(DECAY, 1e7 * Y0, T, method="rk4", options={"largest": 1e9})
    assert torch.allclose(ys[-1], 1e7 * Y0 * torch.exp(-T[-1]), rtol=1e-2)


@pytest.mark.parametrize("func", [FIELD.forward, functools.partial(FIELD.forward)])
def test_parameters_of_a_bound_method_are_found(func):
    odeint(func, Y0, T).sum().backward()
    assert all(p.grad is not None for p in FIELD.parameters())
    FIELD.zero_grad()


def test_parameters_that_are_given_are_those_that_get_gradients():
    first, *others = FIELD.parameters()
    odeint(FIELD, Y0, T, adjoint_params=(first,)).sum().backward()
    assert first.grad is not None and all(p.grad is None for p in others)
    FIELD.zero_grad()


def test_source_is_short():
    """Docstrings, comments and what is empty included."""
    source = Path(reversax_torch.__file__).parent.glob("*.py")
    assert sum(len(path.read_text().splitlines()) for path in source) <= 900
