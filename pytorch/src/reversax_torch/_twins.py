r"""The twins, integers of which what is added is taken back to the bit.

With the increment `Psi` of the base a step and its inverse are

    (C)    (y, z) = mix(y0, z0)                 (B2)   z  = z1 + Psi_{-h}(t1, y1)
    (F1)   y1 = y + Psi_{h}(t0, z)              (B1)   y  = y1 - Psi_{h}(t0, z)
    (F2)   z1 = z - Psi_{-h}(t1, y1)            (BC)   (y0, z0) = unmix(y, z)

The gap is halved `b` times about the mean, or `y` drawn towards `z` by `0 < lam <= 1`
(McCallum & Foster, arXiv 2410.11648, equation (4)):

    (S)    mix(y, z) = (y - c, z + c),  c = (1 - 2**-b)*(y - z)/2,   readout (y + z)/2
    (MF)   mix(y, z) = (lam*y + (1 - lam)*z, z),                     readout y

A fixed-point number is a multiple of a fixed step: one word of 64 bits for single
precision and half, for double two, `high * 2**62 + low`, `0 <= low < 2**62`. None wrap
as long as they and what is added lie below `largest`. Halving sheds `b` bits of a gap:

    (H1)   d = y - z,  g = d >> 1,  c = g - (g >> b),  shed g & (2**b - 1)
    (H2)   after it (y - z) >> 1 = g >> b, so  g = (((y - z) >> 1) << b) | shed.
"""

import math
from typing import Any

import torch
from torch import Tensor

_BITS, _MASK = 62, (1 << 62) - 1
Bits = list[tuple[Tensor, int]]  # Words of what steps shed, and how much each has.


def largest(x: Tensor) -> Tensor:
    return x.abs().amax().float() if x.numel() else torch.zeros(())


def push(bits: Bits, shed: Tensor, count: int) -> None:
    if bits and bits[-1][1] + count <= _BITS:
        word, used = bits.pop()
        shed, count = (word << count) | shed, used + count
    bits.append((shed, count))


def pop(bits: Bits, count: int) -> Tensor:
    word, used = bits.pop()
    if used > count:
        bits.append((word >> count, used - count))
    return word & ((1 << count) - 1)


class Wide:
    """An integer of two words."""

    def __init__(self, high: Tensor, low: Tensor):
        self.high, self.low = high + (low >> _BITS), low & _MASK

    __add__ = lambda self, other: Wide(self.high + other.high, self.low + other.low)
    __sub__ = lambda self, other: Wide(self.high - other.high, self.low - other.low)
    __and__ = lambda self, mask: self.low & mask
    __or__ = lambda self, bits: Wide(self.high, self.low | bits)

    def __rshift__(self, by: int) -> "Wide":
        moved = (self.high << (_BITS - by)) & _MASK
        return Wide(self.high >> by, (self.low >> by) | moved)

    def __lshift__(self, by: int) -> "Wide":
        high = (self.high << by) | (self.low >> (_BITS - by))
        return Wide(high, (self.low << by) & _MASK)


class Symmetric:
    """(S), in fixed point, in which steps are undone to the bit."""

    exact, weights, tolerance = True, (0.5, 0.5), 0.0  # `weights` of the readout.

    def __init__(self, dtype: torch.dtype, largest: Any):
        self.wide = dtype == torch.float64
        # All scale factors must be normal numbers of the dtype that computes.
        usual, limit = (46, 890) if self.wide else (20, 60)
        largest = 2.0**usual if largest is None else largest
        if not 2.0**-limit <= float(largest) <= 2.0**limit:
            raise ValueError(
                f"Pass a number from 2**-{limit} to 2**{limit} as the option "
                f"`largest`, the largest absolute value of a state, not {largest!r}."
            )
        self.largest = 2.0 ** math.ceil(math.log2(largest))
        self.unit = self.largest * 2.0**-_BITS

    def encode(self, x: Tensor) -> Any:
        # Exact but for the last rounding, in single precision too.
        scaled = (x if self.wide else x.float()) * (1 / self.unit)
        high = scaled.round()
        if not self.wide:
            return high.long()
        return Wide(high.long(), scaled.sub_(high).mul_(2.0**_BITS).round_().long())

    def decode(self, n: Any) -> Tensor:
        if not self.wide:
            return n.float().mul_(self.unit)
        # With the lower word in [-2**61, 2**61) small negative numbers keep digits.
        carry = n.low >> (_BITS - 1)
        high, low = (n.high + carry).double(), (n.low - (carry << _BITS)).double()
        return high.mul_(self.unit).add_(low, alpha=2.0**-_BITS * self.unit)

    def readout(self, y: Any, z: Any) -> Tensor:
        return (self.decode(y) + self.decode(z)) * 0.5

    def mix(self, y: Any, z: Any, b: int) -> tuple[tuple, Tensor | None]:
        if b == 0:
            return (y, z), None
        g = (y - z) >> 1  # (H1)
        c = g - (g >> b)  # (H1)
        return (y - c, z + c), g & ((1 << b) - 1)

    def unmix(self, y: Any, z: Any, b: int, bits: Bits) -> tuple:
        if b == 0:
            return y, z
        upper = (y - z) >> 1
        c = ((upper << b) | pop(bits, b)) - upper  # (H2)
        return y + c, z - c

    def pull(self, y: Tensor, z: Tensor, b: int) -> tuple:
        """The cotangents before a mixing, from those after it."""
        c = (y - z) * ((1 - 2.0**-b) / 2)
        return y - c, z + c


class McCallumFoster:
    """(MF), in floating point, where undoing a step loses digits."""

    exact, weights, largest = False, (1.0, 0.0), math.inf
    encode = decode = staticmethod(lambda x: x)
    readout = staticmethod(lambda y, z: y)

    def __init__(self, dtype: torch.dtype, lam: float):
        self.lam, self.tolerance = float(lam), math.sqrt(torch.finfo(dtype).eps)
        if not 0 < self.lam <= 1:
            raise ValueError(
                f"Pass a number in (0, 1] as coupling_parameter, not {lam}."
            )

    def mix(self, y: Tensor, z: Tensor, b: int) -> tuple[tuple, None]:
        return (self.lam * y + (1 - self.lam) * z, z), None

    def unmix(self, y: Tensor, z: Tensor, b: int, bits: Bits) -> tuple:
        return (y - (1 - self.lam) * z) / self.lam, z

    def pull(self, y: Tensor, z: Tensor, b: int) -> tuple:
        return self.lam * y, (1 - self.lam) * y + z
