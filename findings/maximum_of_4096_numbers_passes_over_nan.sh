#!/usr/bin/env bash
# Versions   jax 0.10.2 (jaxlib 0.10.2), numpy 2.3.5, Python 3.11, a CPU (x86-64).
#
# Behaviour  `jnp.max` of an array that holds NaN is NaN, as NumPy's is; from 4,096
#            elements on, on a CPU, it is the largest of the others, and minus infinity if
#            all are NaN (`jnp.min` is plus infinity, the norm `ord=inf` zero), with
#            `jax.jit` and without. Of a matrix, along either axis, it is so as soon as
#            all its elements are as many, however short the axis. `jnp.sum` and
#            `jnp.argmax` see the NaN as ever. So a loop that stops, or a check that fails,
#            when the largest of some numbers is NaN does so for small states alone.
#
# Output     elements | max of ones and a NaN, of NaN; min, norm, sum of NaN
#            4095     | nan, nan; nan, nan, nan
#            4096     | 1.0, -inf; inf, 0.0, nan
#            shape    | max along axis 0 of NaN, along axis 1
#            (63, 65) | nan, nan
#            (64, 64) | -inf, -inf
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    jax==0.10.2 numpy==2.3.5
cat > "$folder/program.py" <<'PROGRAM'
import functools as ft

import jax
import jax.numpy as jnp

lines = []
for n in (4095, 4096):
    nan = jnp.full(n, jnp.nan)
    one = jnp.ones(n).at[n // 2].set(jnp.nan)
    norm = ft.partial(jnp.linalg.norm, ord=jnp.inf)
    largest = [str(float(jax.jit(jnp.max)(x))) for x in (one, nan)]
    others = [str(float(jax.jit(f)(nan))) for f in (jnp.min, norm, jnp.sum)]
    assert largest == [str(float(jnp.max(x))) for x in (one, nan)]
    lines.append(f"{n} | {', '.join(largest)}; {', '.join(others)}")
for shape in ((63, 65), (64, 64)):
    x = jnp.full(shape, jnp.nan)
    found = [str(float(jax.jit(ft.partial(jnp.max, axis=a))(x)[0])) for a in (0, 1)]
    lines.append(f"{shape} | {', '.join(found)}")
print("\n".join(lines))
assert lines == [
    "4095 | nan, nan; nan, nan, nan",
    "4096 | 1.0, -inf; inf, 0.0, nan",
    "(63, 65) | nan, nan",
    "(64, 64) | -inf, -inf",
], "The behaviour is another."
PROGRAM
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py"
