#!/usr/bin/env bash
# Versions   jax 0.10.2, diffrax 0.7.2, equinox 0.13.8, Python 3.11, NumPy 2.3.5, CPU.
#
# Behaviour  An array divided by a number, and a number divided by one that is known
#            when the program is compiled, are not rounded as IEEE 754 says: XLA
#            multiplies by the reciprocal, which is rounded first. So `k/n` is not what
#            NumPy has, with `jax.jit` and without, but a number divided by a number
#            known at run time is. Times of a grid, `t0 + (t1 - t0)*k/n`, therefore
#            differ by an ulp with where they are computed: the same solve of Diffrax by
#            constant steps has other times under `DirectAdjoint` than under its default
#            adjoint. Who looks an end of a step up among saved times, or has a field
#            that jumps there, sees it.
#
# Output     NumPy:               [0.3, 0.6, 0.7]
#            array by number:     [0.30000000000000004, 0.6000000000000001, 0.7000000000000001]
#            number by constant:  [0.30000000000000004, 0.6000000000000001, 0.7000000000000001]
#            number by number:    [0.3, 0.6, 0.7]
#            array by array:      [0.3, 0.6, 0.7]
#            ends of ten steps, default adjoint:  [0.30000000000000004, 0.6000000000000001, 0.7000000000000001]
#            ends of ten steps, DirectAdjoint:    [0.3, 0.6, 0.7]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    diffrax==0.7.2 jax==0.10.2 jaxlib==0.10.2 equinox==0.13.8 numpy==2.3.5

"$folder/venv/bin/python" - <<'PYTHON'
import diffrax
import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)
k, n, chosen = np.arange(1.0, 11.0), 10.0, [2, 5, 6]


def told(name, values):
    values = [float(x) for x in values]
    print(f"{name:20} {values}")
    return values


exact = told("NumPy:", (k / n)[chosen])
off = told("array by number:", np.asarray(jnp.asarray(k) / n)[chosen])
assert exact == [0.3, 0.6, 0.7] != off
by_constant = jax.jit(lambda x: x / n)
assert told("number by constant:", [by_constant(x) for x in k[chosen]]) == off
by_number = jax.jit(lambda x, n: x / n)
assert told("number by number:", [by_number(x, n) for x in k[chosen]]) == exact
by_array = np.asarray(jax.jit(lambda x, n: x / n)(k, np.full(10, n)))
assert told("array by array:", by_array[chosen]) == exact


def ends(adjoint):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.Heun(),
        t0=0.0,
        t1=1.0,
        dt0=0.1,
        y0=1.0,
        saveat=diffrax.SaveAt(steps=True),
        adjoint=adjoint,
        max_steps=16,
    )
    return np.asarray(solution.ts)[chosen]


named = "ends of ten steps, default adjoint: "
assert told(named, ends(diffrax.RecursiveCheckpointAdjoint())) == off
named = "ends of ten steps, DirectAdjoint:   "
assert told(named, ends(diffrax.DirectAdjoint())) == exact
PYTHON
