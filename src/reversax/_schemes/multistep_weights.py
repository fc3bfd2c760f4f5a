r"""The numbers of symmetric multistep methods, each the solution of linear equations.

With `h` the length of a step and `f_n = f(t_n, y_n)`, a method of `k` steps, `k` even,

    (M)    y_{n+k} - y_n + sum_{0<j<k} alpha_j y_{n+j} = h sum_{0<j<k} beta_j f_{n+j}

is symmetric if `alpha_{k-j} = -alpha_j` and `beta_{k-j} = beta_j`. It is solved for
`y_n` as it is for `y_{n+k}`, and needs one evaluation a step (Lambert & Watson, IMA J.
Appl. Math. 18, 1976; Quinlan & Tremaine, Astron. J. 100, 1990; Hairer, Lubich & Wanner,
"Geometric Numerical Integration", 2nd edition, 2006, chapter XV).

`rho`, the polynomial of the `alpha`s, has the roots 1, -1 and pairs on the unit circle,

    (R)    rho(x) = (x^2 - 1) prod_i (x^2 - c_i x + 1),   c_i = 2 cos(theta_i),

and the `beta`s follow from (M) being exact for polynomials of degree `k`,

    (B)    sum_j alpha_j s_j^q = q sum_j beta_j s_j^(q-1),   s_j = j - k/2,  q = 1..k,

of which the even `q` hold by symmetry. On `y' = a y` the mode of a root `x` grows by
`exp(mu h a)` a step, `mu = sigma(x)/(x rho'(x))`, and the error of a step begins with
`C sigma(1) (h d/dt)^(k+1) y`:

    k   c_i           mu of -1   mu of the pairs      C        stable for h |a| < (a
                                                               imaginary)
    4   0.75           -1.30      0.15                0.128    0.68
    6   1.375, 0.625   -1.53      0.31, -0.05         0.182    0.55

The `c_i` were searched for among the multiples of 1/8, so that the `alpha`s are exact
in binary, by the mean digits of six problems at 80 to 400 steps (a network, one that is
damped, van der Pol, Lotka-Volterra, Lorenz, Kepler): smaller ones have smaller errors
`C`, larger ones a longer stability interval, and near the best the mean hardly changes.

On damped problems, `a < 0`, the root -1 has a mode that grows: there values alternate.
(So has, at `exp(0.05 h |a|)` a step, a pair of order 6; the decay of what it is a part
of outweighs that.) Of a window of `k` values and its derivatives,

    (A)    d = sum_j gamma_j y_{n+j} + h sum_j delta_j f_{n+j}

is the amplitude of what alternates, where the `2k` weights are those for which `d` is

    (A1)   zero for polynomials of degree `k - 1`, with their derivatives;
    (A2)   zero for the modes of the pairs, `y_{n+j} = x^j` with `f = 0`;
    (A3)   one for `y_{n+j} = (-1)^j` with `f = 0`;
    (A4)   for `h f_{n+j} = (-1)^j` with `y = 0` what the left eigenvector `(v, u)` of
           the root -1 of (M), as a map of windows, has there: with `v_{k-1} = 1`,
           `v_{j-1} = alpha_j - v_j`, `u_0 = 0`, `u_j = -u_{j-1} - beta_j`.

By (A1) nothing of a smooth solution is taken but what is of the order of the method's
own error, by (A2) corrections do not feed the other modes, which nothing damps (without
it an oscillation of 1e5 steps was lost), and by (A4) what is taken is the mode to first
order in `h`: the limits on damped problems are twice those without it. (By differences
of the values alone `d` would be zero up to degree `k - 2`, and the order fall to
`k - 1`.)

Between the ends of a step lies the polynomial of fifth degree with the values and the
derivatives at these and at one more end: of the step before or, for the first step, of
the one after. A step that is the only one has the cubic one of its ends.
"""

import dataclasses
import functools as ft
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

Row = list[Fraction]


def _solved(rows: Sequence[Row], right: Sequence[Row]) -> list[Row]:
    """`x` with `rows @ x == right`, by Gauss and Jordan, without round-off."""
    table = [[*a, *b] for a, b in zip(rows, right, strict=True)]
    for i in range(len(table)):
        pivot = next(r for r in range(i, len(table)) if table[r][i] != 0)
        table[i], table[pivot] = table[pivot], table[i]
        table[i] = [x / table[i][i] for x in table[i]]
        for r, row in enumerate(table):
            if r != i:
                table[r] = [x - row[i] * p for x, p in zip(row, table[i], strict=True)]
    return [row[len(rows) :] for row in table]


def _product(a: Row, b: Row) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), start=Fraction(0))


def _powers(points: Sequence[int | Fraction], power: int) -> Row:
    return [Fraction(s) ** power for s in points]


def _derivatives(points: Sequence[int | Fraction], power: int) -> Row:
    if power == 0:
        return [Fraction(0) for _ in points]
    return [power * x for x in _powers(points, power - 1)]


def _alphas(cosines: Sequence[Fraction]) -> Row:
    """(R), from the lowest power to the highest."""
    polynomial = [Fraction(-1), Fraction(0), Fraction(1)]
    for c in cosines:
        factor = [Fraction(1), -c, Fraction(1)]
        product = [Fraction(0)] * (len(polynomial) + 2)
        for i, a in enumerate(polynomial):
            for j, b in enumerate(factor):
                product[i + j] += a * b
        polynomial = product
    return polynomial


def _betas(alphas: Row) -> Row:
    """(B)."""
    k = len(alphas) - 1
    points = [Fraction(2 * j - k, 2) for j in range(k + 1)]
    half = range(1, k // 2 + 1)  # The others by symmetry.
    rows, right = [], []
    for q in range(1, k, 2):
        slopes = _derivatives(points, q)
        rows.append([slopes[j] + (slopes[k - j] if 2 * j < k else 0) for j in half])
        powers = _powers(points, q)
        right.append([_product(alphas, powers)])
    solution = [x for (x,) in _solved(rows, right)]
    betas = [Fraction(0), *solution, *solution[-2::-1], Fraction(0)]
    return betas


def _left_slopes(alphas: Row, betas: Row) -> Fraction:
    """(A4): the `u` of what alternates, by the `v` of that."""
    k = len(alphas) - 1
    v, u = [Fraction(1)], [Fraction(0)]
    for j in range(k - 1, 0, -1):
        v.insert(0, alphas[j] - v[0])
    for j in range(1, k):
        u.append(-u[-1] - betas[j])
    signs = [Fraction((-1) ** j) for j in range(k)]
    return _product(u, signs) / _product(v, signs)


def _amplitude(alphas: Row, betas: Row, cosines: Sequence[Fraction]) -> tuple[Row, Row]:
    """(A): the `gamma`s and the `delta`s."""
    k = len(alphas) - 1
    points, none = range(k), [Fraction(0)] * k
    signs = [Fraction((-1) ** j) for j in points]
    rows = [_powers(points, q) + _derivatives(points, q) for q in range(k)]  # (A1)
    right = [[Fraction(0)] for _ in rows]
    for c in cosines:  # (A2): what satisfies y_{j+1} = c y_j - y_{j-1}.
        for first, second in ((0, 1), (1, 0)):
            mode = [Fraction(first), Fraction(second)]
            while len(mode) < k:
                mode.append(c * mode[-1] - mode[-2])
            rows.append(mode + none)
            right.append([Fraction(0)])
    rows += [signs + none, none + signs]  # (A3), (A4)
    right += [[Fraction(1)], [_left_slopes(alphas, betas)]]
    weights = [x for (x,) in _solved(rows, right)]
    return weights[:k], weights[k:]


def _hermite(points: Sequence[int]) -> np.ndarray:
    """The coefficients of the powers 1 to 5, of a polynomial that is `y0` at zero, by
    `y - y0` and the derivatives at `points`."""
    degree = 2 * len(points) - 1
    rows = [[Fraction(s) ** q for q in range(degree + 1)] for s in points]
    slopes = [_derivatives(points, q) for q in range(degree + 1)]
    rows += [list(x) for x in zip(*slopes, strict=True)]
    unit = [[Fraction(i == j) for j in range(degree + 1)] for i in range(degree + 1)]
    return np.array(_solved(rows, unit), float)[1:]


AHEAD, BEHIND, ALONE = range(3)
"""Where the third point of the dense output is."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Those of one method; hashable."""

    alphas: tuple[float, ...]
    """`alpha_0` to `alpha_k`, (M)."""
    betas: tuple[float, ...]
    values: tuple[float, ...]
    """`gamma_0` to `gamma_{k-1}`, (A)."""
    slopes: tuple[float, ...]
    """`delta_0` to `delta_{k-1}`, (A)."""

    @property
    def steps(self) -> int:
        """`k`."""
        return len(self.alphas) - 1


_COSINES = {
    4: (Fraction(3, 4),),
    6: (Fraction(11, 8), Fraction(5, 8)),
}
"""`c_i` of (R)."""

ORDERS = tuple(_COSINES)


@ft.cache
def weights_of_order(order: int) -> Weights:
    cosines = _COSINES[order]
    alphas = _alphas(cosines)
    betas = _betas(alphas)
    rows = alphas, betas, *_amplitude(alphas, betas, cosines)
    return Weights(*[tuple(map(float, row)) for row in rows])


@ft.cache
def dense_weights() -> np.ndarray:
    """Of AHEAD, BEHIND and ALONE: the coefficients of the powers 1 to 5 by `y - y0` at
    the third point and at the end of the step, and by `h f` at the third point, at the
    start and at the end."""
    table = np.zeros((3, 5, 5))
    for kind, third in ((AHEAD, 2), (BEHIND, -1)):
        table[kind] = _hermite([third, 0, 1])[:, [0, 2, 3, 4, 5]]
    table[ALONE, :3, [1, 3, 4]] = _hermite([0, 1])[:, [1, 2, 3]].T
    return table
