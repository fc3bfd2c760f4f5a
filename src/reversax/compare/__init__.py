"""Which solver and which adjoint to take for a problem of one's own, as measured.

`reversax compare MODULE:FUNCTION` measures; the function returns a
[`reversax.compare.Problem`][].
"""

from ._candidates import (
    Candidate as Candidate,
    default_candidates as default_candidates,
)
from ._problem import Problem as Problem
