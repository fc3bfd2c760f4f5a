"""The only imports of names that upstream does not promise to keep.

Every name here has a canary in `tests/test_compat.py`, which says what the rest of the
package relies on. When an upstream release breaks one, this file is where to mend it.
"""

from typing import Any

import diffrax as dfx
import equinox.internal as eqxi

# Diffrax's own integration loop, which every adjoint shares. It takes the keyword
# arguments of `AbstractAdjoint.loop` less `throw` and the `passed_...` flags, plus
# `inner_while_loop` and `outer_while_loop`; it returns `(final_state, aux_stats)`.
from diffrax._integrate import loop as integration_loop  # noqa: F401
from equinox.internal import (
    nondifferentiable as nondifferentiable,
    prevbefore as prevbefore,
    while_loop as while_loop,
)
from jaxtyping import Array, PyTree


def buffer_at_set(buffer: Any, index: Any, value: Any, *, pred: Any) -> Any:
    """`buffer.at[index].set(value)` where `pred` holds, inside a loop of Equinox's that
    was told of the buffer (written in place), or outside of it."""
    return eqxi.buffer_at_set(buffer, index, value, pred=pred)


def replayed_end(
    controller: dfx.ConstantStepSize | dfx.StepTo,
    first_state: PyTree,
    end: Any,
    index: Array,
) -> Any:
    """The end of step `index >= 1` that a controller without a memory prescribes.

    Both controllers' states are a counter that grows by one with each step (alone for
    `StepTo`, first of a tuple for `ConstantStepSize`), and both read the next end off
    the counter, so any step's end follows from the state before the first step.
    `end` only lends its dtype.
    """
    if isinstance(controller, dfx.StepTo):
        state: Any = first_state + index - 1
    else:
        counter, *rest = first_state
        state = (counter + index - 1, *rest)
    _, _, next_end, _, _, _ = controller.adapt_step_size(
        end, end, None, None, None, None, None, state
    )
    return next_end
