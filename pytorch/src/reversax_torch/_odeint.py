"""What users call, and states as they have them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._solve import Walk
from ._steps import BASES, Base, Controller, Grid, Time, at_times, even, halvings_of
from ._twins import McCallumFoster, Symmetric

_ADAPTIVE = {x.name for x in dataclasses.fields(Controller)} - {"rtol", "atol"}
_OPTIONS = _ADAPTIVE | {
    *("step_size", "num_steps", "grid_constructor", "halvings_per_step", "largest"),
    *("coupling", "coupling_parameter", "round_trip_tolerance", "dtype"),
}


@torch.compiler.disable()
def odeint(
    func: Callable,
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = "dopri5",
    options: dict[str, Any] | None = None,
    event_fn: Callable | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """Solves `dy/dt = func(t, y)`, called as `torchdiffeq.odeint`, with exact gradients
    in memory that hardly grows with the number of steps.

    Gradients by `y0`, parameters and `t` are those of the discrete solve: steps are
    undone to the bit, which every backward pass checks. For stiff problems, events and
    second derivatives use another package, for short solves `torchdiffeq.odeint`.

    **Arguments:**

    - `func`: `func(t, y)` of a scalar and a state; the same for the same arguments.
    - `y0`: the state at `t[0]`, a tensor of real numbers or a tuple of such.
    - `t`: the times to return the solution at, increasing or decreasing.
    - `rtol`, `atol`: steps that adapt may have an error of `atol + rtol*|y|` in the
        root mean square; numbers or tensors, for a tuple also tuples.
    - `method`: the base, of which a step takes two: "euler", "midpoint", "heun2",
        "heun3", "rk4" in fixed steps, "bosh3", "dopri5", "tsit5", "dopri8" in steps
        that adapt, unless one of the first three options is there.
    - `options`: "step_size", "num_steps" or "grid_constructor" for fixed steps, which
        else end at `t`; "first_step", "min_step", "max_step", "safety", "ifactor",
        "dfactor", "max_num_steps", "step_t", "norm" for others; "halvings_per_step" of
        the gap between the twins, 1/m or up to 4, more for more damping, or "auto";
        "largest", that the state reaches, else 2**20, in double precision 2**46;
        "round_trip_tolerance" of the way back, relative to the largest state, else 0;
        "coupling", "mccallum-foster" as published, with "coupling_parameter", 0.999.
    - `event_fn`: none is taken.
    - `adjoint_params`: what has gradients; by default the parameters of a module.

    **Returns:** the solution at `t`, one more dimension in front; for a tuple a tuple.

    **Raises:** `TypeError`, `ValueError`, `NotImplementedError` for what is not taken,
    `FloatingPointError` for a solution not finite, too large or damped too much,
    `RuntimeError` if no step is short enough or a way back misses the initial state.
    """
    options = {k: v for k, v in (options or {}).items() if v is not None}
    base = _checked(func, t, method, options, event_fn)
    state = _State(func, y0)
    module, params, names = _parameters(func, adjoint_params)
    steps = _steps(state, base, rtol, atol, options)
    total = 320 if isinstance(steps, Controller) else 256
    halvings = halvings_of(options.get("halvings_per_step", "auto"), total)
    twins = _twins(state.y0.dtype, options)
    checks = torch.is_grad_enabled() and adjoint_params is None
    walk = Walk(state.field, base, twins, steps, halvings, module, names, checks)
    ys = walk.solve(t, state.y0, *params) if len(t) > 1 else state.y0[None]
    return state.unpack(ys, len(t))


def odeint_adjoint(func: Callable, y0: Any, t: Tensor, **keywords: Any) -> Any:
    """`odeint` for programs that call `torchdiffeq.odeint_adjoint`: "adjoint_rtol",
    "adjoint_atol", "adjoint_method" and "adjoint_options" make no difference, since the
    backward pass has no error."""
    for name in ("rtol", "atol", "method", "options"):
        keywords.pop(f"adjoint_{name}", None)
    return odeint(func, y0, t, **keywords)


def _checked(func: Any, t: Any, method: Any, options: dict, event_fn: Any) -> Base:
    if event_fn is not None:
        raise NotImplementedError(
            "Use `torchdiffeq.odeint_event` for events, or Diffrax with reversax."
        )
    for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
        if hasattr(func, name):
            raise NotImplementedError(f"Delete `{name}`: only the field is called.")
    if (base := BASES.get(method or "dopri5")) is None:
        raise ValueError(
            f"Choose an explicit one-step method, one of {', '.join(BASES)}: "
            f"{method!r} cannot be reversed. torchdiffeq and Diffrax have others."
        )
    if unknown := {*options} - _OPTIONS:
        raise ValueError(
            f"Leave out of `options` {', '.join(sorted(unknown))}. At jumps have steps "
            "end, `step_t`; values within steps are of the base's order anyhow."
        )
    if not (isinstance(t, Tensor) and t.is_floating_point() and t.ndim == 1):
        raise TypeError("Pass `t` as a floating-point tensor, `t.ndim == 1`.")
    steps = t.detach().diff()
    if len(t) == 0 or not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise ValueError("Pass `t` strictly increasing or strictly decreasing.")
    return base


class _State:
    """A tensor or a tuple of tensors, laid end to end as `y0`, and its field."""

    def __init__(self, func: Callable, y0: Any):
        parts = (y0,) if isinstance(y0, Tensor) else y0
        if not (isinstance(parts, tuple) and all(isinstance(x, Tensor) for x in parts)):
            raise TypeError("Pass `y0` as a tensor, or as a tuple of tensors.")
        if others := [x.dtype for x in parts if not x.is_floating_point()]:
            raise TypeError(
                "Convert the state to real floating-point numbers, or, if it is "
                f"complex, by `torch.view_as_real`: it is of {others[0]}."
            )
        self.shapes = None if isinstance(y0, Tensor) else [x.shape for x in parts]
        self.func, self.y0 = func, self.pack(y0)

    def pack(self, y: Any) -> Tensor:
        return y if self.shapes is None else torch.cat([x.reshape(-1) for x in y])

    def unpack(self, x: Tensor, *leading: int) -> Any:
        if self.shapes is None:
            return x
        parts = x.split([shape.numel() for shape in self.shapes], dim=-1)
        shaped = zip(parts, self.shapes, strict=True)
        return tuple(part.reshape(*leading, *shape) for part, shape in shaped)

    def field(self, t: Time, x: Tensor) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.full((), t, dtype=x.dtype, device=x.device)
        k = self.pack(self.func(t.to(x.device, x.dtype), self.unpack(x)))
        if k.shape != x.shape:
            raise ValueError(
                "Have the field return what has the shape of the state: it returned "
                f"{tuple(k.shape)} for {tuple(x.shape)}."
            )
        return k.to(x.dtype)

    def tolerance(self, value: Any) -> Any:
        """A number, or one for each element of `y0`."""
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError("Detach `rtol` and `atol`: they have no gradient.")
        if self.shapes is None or not isinstance(value, tuple | list):
            return value
        each = zip(value, self.shapes, strict=True)
        each = [torch.as_tensor(x).expand(shape.numel()) for x, shape in each]
        return torch.cat(each).to(self.y0)

    def norm(self, y: Any) -> Tensor:
        """The root mean square; of a tuple the largest of those of its tensors."""
        parts = (y,) if self.shapes is None else y
        return torch.stack([x.pow(2).mean().sqrt() for x in parts]).amax()


def _parameters(func: Any, given: Iterable[Tensor] | None) -> tuple:
    """The module that a field is, or a method of, else an empty one; the parameters, as
    torchdiffeq finds them, in a replica tensors that its modules hold; their names."""
    func = func.func if isinstance(func, functools.partial) else func
    owner = getattr(func, "__self__", func)
    module = owner if isinstance(owner, nn.Module) else nn.Module()
    if given is None:
        given = module.parameters()
        if getattr(module, "_is_replica", False):
            held = [x for part in module.modules() for x in vars(part).values()]
            given = [x for x in held if isinstance(x, Tensor)]
    params = [p for p in given if p.is_floating_point() or p.is_complex()]
    names = {id(p): name for name, p in module.named_parameters()}
    return module, params, [names.get(id(p)) for p in params]


def _twins(dtype: torch.dtype, options: dict) -> Symmetric | McCallumFoster:
    coupling = options.get("coupling", "symmetric")
    if coupling not in ("symmetric", "mccallum-foster"):
        raise ValueError(f'Pass "symmetric" or "mccallum-foster", not {coupling!r}.')
    twins = Symmetric(dtype, options.get("largest"))
    if coupling == "mccallum-foster":
        twins = McCallumFoster(dtype, options.get("coupling_parameter", 0.999))
    twins.tolerance = options.get("round_trip_tolerance", twins.tolerance)
    return twins


def _steps(state: _State, base: Base, rtol, atol, options: dict) -> Grid | Controller:
    if constructor := options.get("grid_constructor"):
        return lambda t: constructor(state.func, state.y0, t).double()
    if "step_size" in options or "num_steps" in options:
        return lambda t: even(t, options.get("step_size"), options.get("num_steps"))
    if not base.error:
        return at_times
    given = {k: v for k, v in options.items() if k in _ADAPTIVE}
    norm = given.pop("norm", state.norm)
    given["step_t"] = torch.as_tensor(given.get("step_t", ())).tolist()
    rtol, atol = (state.tolerance(x) for x in (rtol, atol))
    return Controller(rtol, atol, lambda x: norm(state.unpack(x)), **given)
