"""Finds the coarsest setting that is accurate enough.

A setting is a number of constant steps, or a tolerance of an adaptive controller. All
are tried in turn, from the coarsest on: as each costs a fixed factor more than the one
before, that costs no more than some six runs of the last, and takes nothing for granted
about how the error falls.
"""

import math
import statistics
from collections.abc import Callable, Sequence

AN_OCTAVE = 4
"""So many settings double the number of steps."""
# One of so many finer settings must be accurate too: a lone one is luck, as where an
# error changes its sign; and a lone miss is not held against it.
_CONFIRMED_BY = 2
# An error that is so small has begun to fall, and can be told to have ceased to.
_FALLING = 0.1
# How far the finest setting may be from what is wanted, as estimated by the order.
_SPARE = 10.0


def step_counts(most: int) -> list[int]:
    """From one on, an octave in four, as far as integers go."""
    number = AN_OCTAVE * math.ceil(math.log2(most) + 1)
    every = {round(2 ** (k / AN_OCTAVE)) for k in range(number)}
    return sorted(n for n in every if n <= most)


def tolerances(least: float) -> list[float]:
    """From a tenth on, four in a factor of ten, of two digits that one may write."""
    number = math.floor(-4 * math.log10(least))
    return [float(f"{10 ** (-k / 4):.1e}") for k in range(4, number + 1)]


def coarsest(
    error_of: Callable[[int], float],
    wanted: float,
    sizes: Sequence[float],
    order: float | None,
) -> int:
    """The index of the coarsest setting whose error is as `wanted`; if there is none,
    of that of the least error.

    **Arguments:** `error_of(index)`, infinite if there is no gradient; `sizes`, of the
    steps in each setting, from the coarsest on; `order`, the power of these that errors
    fall by, or `None` if they are tolerances.
    """
    errors: list[float] = []

    def confirmed(i: int) -> float:
        finer = errors[i + 1 : i + 1 + _CONFIRMED_BY]
        return max(errors[i], min(finer, default=0.0))

    for index in range(len(sizes)):
        errors.append(error_of(index))
        for i in range(max(0, index - _CONFIRMED_BY), index):
            if confirmed(i) <= wanted:
                return i
        if min(errors[-AN_OCTAVE:]) > wanted and _is_hopeless(
            errors, wanted, sizes, order
        ):
            break
    return min(range(len(errors)), key=confirmed)


def _is_hopeless(
    errors: list[float], wanted: float, sizes: Sequence[float], order: float | None
) -> bool:
    """Whether no finer setting will be accurate enough."""
    now = statistics.median(errors[-AN_OCTAVE:])
    # Two octaves before.
    before = errors[-3 * AN_OCTAVE : -2 * AN_OCTAVE]
    if len(before) == AN_OCTAVE and now >= statistics.median(before):
        # Tolerances that were looser than the errors did not decide them yet.
        decided = order is not None or sizes[len(errors) - 1 - 2 * AN_OCTAVE] < now
        return decided and statistics.median(before) < _FALLING
    if order is None or not now < _FALLING:
        return False
    finest = now * (sizes[-1] / sizes[len(errors) - 1]) ** order
    return finest > _SPARE * wanted
