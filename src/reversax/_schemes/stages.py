"""Whether the stages of a Runge-Kutta method are written to memory, one by one.

A compiler that is free to fuses them: each array that is needed is computed from the
state that the step begins with, all stages on the way evaluated anew. Written to
memory, what one stage leads to is read by the next. That is worth it

- if an element depends on others of the state, by operations that are fused
  nevertheless, as of a stencil: else stages are evaluated once for each number that the
  next one reads;
- if an element depends on its own by functions that are not linear: then the pull-back
  needs arrays of every stage, each of which would begin with the first.

What a product of matrices, or a loop, makes of the state is written to memory anyway.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .._xla.closure import Closed
from .._xla.one_kernel import keeps_out_of_kernels
from .._xla.programs import (
    NOT_FUSED,
    equations_of,
    following_equations_of,
    programs_in,
)

_LARGE, _LARGE_IN_KERNEL = 256, 8
"""From which size on of a state. In a kernel writing costs next to nothing."""

_ELSEWHERE = {"concatenate", "pad", "rev", "slice"}
_ELSEWHERE_IN_THE_FIRST = {"dynamic_slice", "gather"}

_LINEAR = _ELSEWHERE | {
    *("add", "add_any", "sub", "neg", "reduce_sum", "real", "imag", "conj", "name"),
    *("broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose"),
    *("convert_element_type", "reduce_precision", "copy", "copy_p"),
}
_LINEAR_IN_ONE = {"mul": {0, 1}, "div": {0}, "dynamic_slice": {0}, "gather": {0}}
"""Linear in one of these operands, if no other depends on the state."""


def written_from(vf_prod: Closed) -> int | None:
    """From which size of a state on they are, of a closed function of a time, a state
    and a control; `None` if they are not."""
    of_state = vf_prod.are_of(1)
    following = following_equations_of(vf_prod.program, of_state)
    fused = [_Follows(x, x) for x in of_state]
    reads_elsewhere = any(_reads_elsewhere(*x) for x in following)
    if not reads_elsewhere and not _is_nonlinear(vf_prod.program, fused)[0]:
        return None
    equations = list(equations_of(vf_prod.program))
    return _LARGE if any(map(keeps_out_of_kernels, equations)) else _LARGE_IN_KERNEL


def _reads_elsewhere(equation: Any, of_state: Sequence[bool]) -> bool:
    # (Which elements of a parameter, or of a path, costs nothing to evaluate anew.)
    name = equation.primitive.name
    if name in _ELSEWHERE_IN_THE_FIRST:
        return of_state[0]
    return name in _ELSEWHERE and any(of_state)


class _Follows(NamedTuple):
    """How an array follows from the state."""

    at_all: bool
    fused: bool
    """By operations alone that are fused."""


def _is_nonlinear(
    program: Any, arguments: Sequence[_Follows]
) -> tuple[bool, list[_Follows]]:
    """Whether an operation that is fused with the state is not linear in it; and how
    what the program returns follows from it, given how its arguments do."""
    known = dict(zip(map(id, program.invars), arguments, strict=True))
    read = lambda xs: [known.get(id(x), _Follows(False, False)) for x in xs]
    found = False
    for equation in program.eqns:
        operands = read(equation.invars)
        inner = programs_in(equation)
        apart = equation.primitive.name in NOT_FUSED
        if not apart and len(inner) == 1 and len(inner[0].invars) == len(operands):
            found_inside, out = _is_nonlinear(inner[0], operands)
            found = found or found_inside
        else:
            found = found or (not apart and _is_nonlinear_in(equation, operands))
            fused = any(x.fused for x in operands) and not apart
            follows = _Follows(any(x.at_all for x in operands), fused)
            out = [follows] * len(equation.outvars)
        known.update(zip(map(id, equation.outvars), out, strict=True))
    return found, read(program.outvars)


def _is_nonlinear_in(equation: Any, operands: list[_Follows]) -> bool:
    """Whether the operation is not linear in those that are fused with the state."""
    name = equation.primitive.name
    if name in _LINEAR or not any(x.fused for x in operands):
        return False
    following = [i for i, x in enumerate(operands) if x.at_all]
    places = _LINEAR_IN_ONE.get(name, set())
    return len(following) > 1 or following[0] not in places
