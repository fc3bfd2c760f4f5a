"""States as users have them, packed into one tensor, and the parameters of fields."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Time


class State:
    """One as users have it, a tensor or a tuple of such, laid end to end as `y0`, and
    its field."""

    def __init__(self, func: Callable, y0: Any):
        parts = (y0,) if isinstance(y0, Tensor) else y0
        if not (isinstance(parts, tuple) and all(isinstance(x, Tensor) for x in parts)):
            raise TypeError("Pass `y0` as a tensor, or as a tuple of tensors.")
        for x in parts:
            if not x.is_floating_point():
                raise TypeError(
                    "Convert the state to real floating-point numbers, or, if it is "
                    f"complex, by `torch.view_as_real`: it is of {x.dtype}."
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


def norm(y: Any) -> Tensor:
    """The root mean square; of a tuple the largest of those of its tensors."""
    parts = (y,) if isinstance(y, Tensor) else y
    return torch.stack([x.pow(2).mean().sqrt() for x in parts]).amax()


def module_of(func: Any) -> nn.Module:
    """The module that a field is, or a method of; else one that has nothing."""
    if isinstance(func, functools.partial):
        return module_of(func.func)
    owner = getattr(func, "__self__", func)
    return owner if isinstance(owner, nn.Module) else nn.Module()


def parameters_of(module: nn.Module) -> Iterable[Tensor]:
    """As torchdiffeq finds them: in a replica tensors that its modules hold."""
    if not getattr(module, "_is_replica", False):
        return module.parameters()
    held = [x for part in module.modules() for x in vars(part).values()]
    return [x for x in held if isinstance(x, Tensor)]


class Held(nn.ModuleDict):
    """Calls anything, in which its modules may then have other parameters."""

    def forward(self, call: Callable, *arguments: Any) -> Any:
        return call(*arguments)


def check_that_all_are_known(known: list[Tensor], value: Tensor) -> None:
    """Raises if it depends on a tensor that has gradients and is not known."""
    ids = {id(x) for x in known}
    seen = {None, *(x.grad_fn for x in known)}
    to_see: list[Any] = [value.grad_fn]
    for node in to_see:
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ids:
            raise ValueError(
                "Pass `adjoint_params=(...)`, what the field reads that is to have a "
                "gradient (`tuple(module.parameters())`; `()` if nothing is): it reads "
                f"a tensor of shape {tuple(leaf.shape)} that is not known."
            )
        if node not in seen:
            seen.add(node)
            to_see.extend(parent for parent, _ in node.next_functions)
