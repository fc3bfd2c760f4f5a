r"""Dense output of a step of twins.

Between the ends of a step, `theta` running from 0 to 1, the solution is the base's own
interpolant `u` of its step from `z` plus the linear change of the difference between
the readout `r` and `u`:

    (D)    r(theta) = u(theta) + (1 - theta) (r0 - u(0)) + theta (r1 - u(1)).

It meets both end values. Since `r - u` is the gap between two solutions of the base's
order, (D) has the order of the base's interpolation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._numbers.arithmetic import State
from .control import Time


class StepEnds(NamedTuple):
    """The values that dense output of a step is made from."""

    readout0: State
    readout1: State
    z: State
    increment: State
    base_dense_info: PyTree[Array]


def dense_info(ends: StepEnds) -> dict[str, Any]:
    """The `dense_info` of a step, for [`TwinInterpolation`][]."""
    difference = lambda a, b: jtu.tree_map(lambda x, y: x - y, a, b)
    gap0 = difference(ends.readout0, ends.z)
    gap1 = difference(difference(ends.readout1, ends.z), ends.increment)
    return dict(base_dense_info=ends.base_dense_info, gap0=gap0, gap1=gap1)


class TwinInterpolation(dfx.AbstractLocalInterpolation):
    """(D) on one step. `base_cls` is the base's own interpolation."""

    t0: Time
    t1: Time
    base: dfx.AbstractLocalInterpolation | None
    gap0: State
    gap1: State

    def __init__(self, *, base_cls, t0, t1, base_dense_info, gap0, gap1):
        self.t0 = t0
        self.t1 = t1
        self.base = None
        if base_dense_info is not None:
            self.base = base_cls(t0=t0, t1=t1, **base_dense_info)
        self.gap0 = gap0
        self.gap1 = gap1

    def evaluate(self, t0, t1=None, left: bool = True) -> State:
        if t1 is not None:
            at_t0, at_t1 = self.evaluate(t0, left=left), self.evaluate(t1, left=left)
            return jtu.tree_map(lambda a, b: b - a, at_t0, at_t1)
        assert self.base is not None
        length = self.t1 - self.t0
        # A step of no length has gap0 == gap1 == r - u.
        theta = (t0 - self.t0) / jnp.where(length == 0, 1, length)
        u = self.base.evaluate(t0, left=left)
        mix = lambda u, a, b: u + ((1 - theta) * a + theta * b).astype(a.dtype)
        return jtu.tree_map(mix, u, self.gap0, self.gap1)  # (D)


class TwinInterpolationFactory(eqx.Module):
    """`TwinInterpolation` over one base interpolation: an `interpolation_cls`.

    A module rather than a `functools.partial`, so that two of them compare equal.
    """

    base_cls: Callable[..., dfx.AbstractLocalInterpolation] = eqx.field(static=True)

    def __call__(self, **kwargs) -> TwinInterpolation:
        return TwinInterpolation(base_cls=self.base_cls, **kwargs)
