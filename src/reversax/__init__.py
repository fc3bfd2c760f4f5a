"""Exact gradients of differential equation solvers in constant memory."""

from ._adjoint import ReversibleAdjoint as ReversibleAdjoint
from ._numbers.arithmetic import FloatingPoint as FloatingPoint
from ._numbers.fixed_point import FixedPoint as FixedPoint
from ._round_trip import (
    RoundTripError as RoundTripError,
    round_trip_error as round_trip_error,
)
from ._schemes.coupling import (
    McCallumFoster as McCallumFoster,
    Pair as Pair,
    Symmetric as Symmetric,
)
from ._solver import Reversible as Reversible

__version__ = "0.1.0"
