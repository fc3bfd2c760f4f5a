#!/usr/bin/env bash
# Versions   jax 0.10.2 (jaxlib 0.10.2), numpy 2.3.5, Python 3.11, a CPU.
#
# Behaviour  One step of a Runge-Kutta method is compiled to one loop, in which each stage
#            is evaluated once: `s` sines a number for `s` stages of `y' = sin(y)`. If the
#            program also returns `cos` of the argument of each stage (what the step's
#            derivative needs), it evaluates not `2*s` functions but `s*(s + 3)/2`, 44 for
#            16 at `s = 8`: each array that is returned has a loop of its own, which
#            begins with the first stage. Nothing is shared between them, though the jaxpr
#            names every value once. So a forward pass that keeps what its pull-back needs
#            may cost several times the solve itself, the more the higher the order. Where
#            each stage passes through a branch of a conditional (here on a run-time
#            predicate) there are `3*s - 1`.
#
# Output     stages: 2, functions a number: 2 alone, 5 with what is needed, 5 by branches
#            stages: 4, functions a number: 4 alone, 14 with what is needed, 11 by branches
#            stages: 6, functions a number: 6 alone, 27 with what is needed, 17 by branches
#            stages: 8, functions a number: 8 alone, 44 with what is needed, 23 by branches
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    jax==0.10.2 numpy==2.3.5
cat > "$folder/program.py" <<'PROGRAM'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp

SIZE = 1000


def step(y, go, stages, keeps, branches):
    slopes, kept = [], []
    for _ in range(stages):
        z = y
        for j, slope in enumerate(slopes):
            z = z + 0.1 * (j + 1) * slope
        if branches:
            z = jax.lax.cond(go, lambda z: z, jnp.zeros_like, z)
        slopes.append(jnp.sin(z))
        kept.append(jnp.cos(z))
    return y + sum(slopes), kept if keeps else []


def functions(*options):
    program = jax.jit(lambda y, go: step(y, go, *options))
    compiled = program.lower(jnp.ones(SIZE), True).compile()
    return int(compiled.cost_analysis()["transcendentals"]) // SIZE


found = []
for stages in (2, 4, 6, 8):
    alone, needed = functions(stages, False, False), functions(stages, True, False)
    branches = functions(stages, True, True)
    print(
        f"stages: {stages}, functions a number: {alone} alone, "
        f"{needed} with what is needed, {branches} by branches"
    )
    found.append((alone, needed, branches))
assert found == [(2, 5, 5), (4, 14, 11), (6, 27, 17), (8, 44, 23)], found
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
