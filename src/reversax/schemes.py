"""What solvers that undo themselves are written with: see "Writing a scheme"."""

from ._numbers.arithmetic import AbstractArithmetic as AbstractArithmetic
from ._schemes.control import Leg as Leg
from ._schemes.moves import (
    AbstractMove as AbstractMove,
    Add as Add,
    Repeated as Repeated,
    Swap as Swap,
)
from ._schemes.native import (
    AbstractNative as AbstractNative,
    AbstractReusing as AbstractReusing,
    AbstractTwice as AbstractTwice,
    Reflect as Reflect,
)
from ._schemes.scheme import (
    AbstractScheme as AbstractScheme,
    Lost as Lost,
    Span as Span,
)
from ._schemes.vector_fields import (
    field_of as field_of,
    fields_of_two as fields_of_two,
)
from ._symplectic import AbstractNativeSolver as AbstractNativeSolver
