"""Exact gradients of differential equation solvers in constant memory."""

from ._adjoint import ReversibleAdjoint as ReversibleAdjoint
from ._multistep import SymmetricMultistep as SymmetricMultistep
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
from ._symplectic import (
    BlanesMoan6 as BlanesMoan6,
    KahanLi8 as KahanLi8,
    Verlet as Verlet,
    Yoshida4 as Yoshida4,
)

__version__ = "0.1.0"
