"""A solve as one function for PyTorch's autograd."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._back import back
from ._state import is_transformed
from ._walk import Problem, Walk

_SECOND = (
    "Differentiate once: `reversax_torch.odeint` has no second derivative. Use "
    "`torchdiffeq.odeint`, or forward over reverse with the JAX package reversax."
)
_FORWARD = (
    "Use reverse mode (`backward`, `torch.func.grad`): `reversax_torch.odeint` has no "
    "forward mode. Or use `torchdiffeq.odeint`."
)
_BATCHED = (
    "Give the batch a dimension of the state, or loop: under `torch.vmap` only `y0` "
    "may be batched, and only it may have gradients for each element."
)


class Solve(torch.autograd.Function):
    """The solution at `t`."""

    @staticmethod
    def forward(problem: Problem, t: Tensor, y0: Tensor, *params: Tensor) -> Tensor:
        walk = Walk(problem, t.detach(), y0.detach())
        ys, problem.walk = walk.ys, walk if problem.records else None
        # Nothing refers to the solution or back to the problem: it dies with its graph.
        del walk.ys, walk.problem, walk.decoded
        return ys

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.problem, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> tuple:
        t, y0, *params = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        needed = [p for p, needs in zip(params, wanted, strict=True) if needs]
        t_ct, y0_ct, *found = PullBack.apply(ctx.problem, wanted, t, y0, ct, *needed)
        return None, t_ct, y0_ct, *(found.pop(0) if x else None for x in wanted)

    @staticmethod
    def vmap(info: Any, dims: tuple, problem: Problem, t, y0, *params) -> tuple:
        held = () if problem.module is None else problem.module.parameters()
        batched = any(d is not None for d in (dims[1], *dims[3:]))
        if batched or any(map(is_transformed, held)):
            raise NotImplementedError(_BATCHED)
        field = torch.vmap(problem.field, in_dims=(None, 0))
        problem.batched = replace(problem, field=field, check=None)
        return Solve.apply(problem.batched, t, y0.movedim(dims[2], 0), *params), 1

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(_FORWARD)


class PullBack(torch.autograd.Function):
    """The cotangents of `t`, the initial state and the parameters."""

    @staticmethod
    def forward(problem: Problem, wanted: tuple, t, y0, ct, *params) -> tuple:
        names = [name for name, x in zip(problem.names, wanted, strict=True) if x]
        return back(problem, t, y0, ct, params, names)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None: ...

    @staticmethod
    def backward(ctx: Any, *cts: Tensor) -> None:
        raise NotImplementedError(_SECOND)

    @staticmethod
    def vmap(info: Any, dims: tuple, problem: Problem, wanted, t, y0, ct, *params):
        if problem.batched is None and dims[4] is not None:
            # Of one solve, for several cotangents.
            pull = lambda c: PullBack.apply(problem, wanted, t, y0, c, *params)
            each = [pull(c) for c in ct.unbind(dims[4])]
            return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
        if params or dims[2] is not None or problem.time_gradient:
            raise NotImplementedError(_BATCHED)
        y0 = y0.movedim(dims[3], 0)
        ct = ct.movedim(dims[4], 1) if dims[4] is not None else ct[:, None]
        ct = ct.expand(len(t), *y0.shape)
        return PullBack.apply(problem.batched, wanted, t, y0, ct), (None, 0)

    jvp = Solve.jvp
