r"""How the two twins of a reversible step see each other.

A reversible solver advances a pair of twins `(y, z)`, both equal to `y0` at the start.
A *coupling* is the linear, invertible mixing of the pair that precedes each step; it
contracts the gap between the twins, which nothing else would do. With it the step is

    (C)    (y, z) = mix(y0, z0)
    (F1)   y1 = y + Psi_{h}(t0, z)
    (F2)   z1 = z - Psi_{-h}(t1, y1)

and what the user sees is `readout(y, z)`.

McCallum & Foster (arXiv 2410.11648, equation (4)) with `0 < lam <= 1`:

    (MF)   mix(y, z) = (lam*y + (1 - lam)*z, z),     readout(y, z) = y
"""

import abc

import equinox as eqx
import jax.core
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree


class Pair(eqx.Module):
    """The twins of a reversible solver: two states of the same structure.

    `y` is the twin the step begins with in (F1), `z` the coupled one. Both are PyTrees
    of arrays shaped like `y0`.
    """

    y: PyTree[Array]
    z: PyTree[Array]


class AbstractCoupling(eqx.Module):
    """Mixes the twins before each step. `mix` is linear and `unmix` its inverse."""

    @abc.abstractmethod
    def mix(self, pair: Pair) -> Pair:
        """The pair that (F1) and (F2) start from."""

    @abc.abstractmethod
    def unmix(self, pair: Pair) -> Pair:
        """Undoes `mix`."""

    @abc.abstractmethod
    def readout(self, pair: Pair) -> PyTree[Array]:
        """The solution that the pair stands for, shaped like `y0`; linear."""


def _as_coupling_parameter(value) -> float:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            "`reversax.McCallumFoster(coupling_parameter=...)` got a traced value "
            f"({value}). The coupling parameter is a constant of the scheme: pass a "
            "Python float, outside of `jax.jit`, `jax.vmap` and `jax.grad`."
        )
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(
            "`reversax.McCallumFoster(coupling_parameter=...)` needs a number in "
            f"(0, 1], got {value!r}."
        )
    value = float(value)
    if not 0 < value <= 1:
        raise ValueError(
            "`reversax.McCallumFoster(coupling_parameter=...)` must lie in (0, 1], got "
            f"{value}. Values just below 1, such as the published 0.999, keep the "
            "backward reconstruction accurate; smaller values damp the gap between the "
            "twins faster."
        )
    return value


class McCallumFoster(AbstractCoupling):
    """The coupling of McCallum & Foster, "Efficient, Accurate and Stable Gradients for
    Neural ODEs" (arXiv 2410.11648, equation (4)).

    Use it for non-stiff problems of up to some thousands of steps: undoing a step
    amplifies round-off by `1/coupling_parameter`, hence `n` steps by
    `coupling_parameter**-n`, and the scheme is stable on a damped mode `y' = alpha*y`
    only for `h*|alpha| < -ln(coupling_parameter)` (0.001 at the default). Every
    backward pass checks what it lost, see [`reversax.ReversibleAdjoint`][].

    The order is that of the base solver.
    """

    coupling_parameter: float = eqx.field(
        default=0.999, converter=_as_coupling_parameter, static=True
    )

    def mix(self, pair: Pair) -> Pair:
        lam = self.coupling_parameter
        y = jtu.tree_map(lambda y, z: lam * y + (1 - lam) * z, pair.y, pair.z)  # (MF)
        return Pair(y, pair.z)

    def unmix(self, pair: Pair) -> Pair:
        lam = self.coupling_parameter
        y = jtu.tree_map(lambda y, z: (y - (1 - lam) * z) / lam, pair.y, pair.z)  # (MF)
        return Pair(y, pair.z)

    def readout(self, pair: Pair) -> PyTree[Float[Array, "..."]]:
        return pair.y


McCallumFoster.__init__.__doc__ = """**Arguments:**

- `coupling_parameter`: `lam` in (MF), a Python float in (0, 1]; dimensionless.

**Raises:** `ValueError` outside (0, 1], `TypeError` for a traced value.
"""
