#!/usr/bin/env bash
# Versions   diffrax 0.7.2, jax 0.10.2, equinox 0.13.8, Python 3.11, CPU.
#
# Behaviour  A solve that runs out of steps raises, and so does its gradient. Within
#            `jax.jit` the gradient of a loss that is linear in the solution does not:
#            its value is not needed, with it the compiler leaves out the check that
#            hangs on what the solve returned, and what comes back is the gradient at
#            the time that was reached. So with each adjoint of Diffrax, and in forward
#            mode. A squared loss raises, since its gradient reads the solution.
#
# Output     jax.grad of a sum: raised
#            jax.jit of jax.grad of a sum: 0.818731, which is exp(-0.2), not exp(-1)
#            jax.jit of jax.grad of a sum of squares: raised
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    diffrax==0.7.2 jax==0.10.2 jaxlib==0.10.2 equinox==0.13.8

if ! "$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON'
import math

import diffrax
import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)


def loss_of(measure, adjoint):
    def loss(y0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.01,
            y0=y0,
            max_steps=20,  # Of the hundred that it takes.
            adjoint=adjoint,
        )
        return jnp.sum(measure(solution.ys))

    return loss


def outcome(gradient):
    try:
        return float(jax.block_until_ready(gradient(jnp.ones(1)))[0])
    except Exception as error:
        assert "maximum number of solver steps" in str(error), error
        return "raised"


ADJOINTS = {
    jax.grad: [
        diffrax.RecursiveCheckpointAdjoint(),
        diffrax.DirectAdjoint(),
        diffrax.BacksolveAdjoint(),
    ],
    jax.jacfwd: [diffrax.ForwardMode()],
}
for derivative, adjoints in ADJOINTS.items():
    for adjoint in adjoints:
        of_sum = derivative(loss_of(lambda y: y, adjoint))
        of_squares = derivative(loss_of(lambda y: y**2, adjoint))
        seen = [outcome(f) for f in (of_sum, jax.jit(of_sum), jax.jit(of_squares))]
        print(type(adjoint).__name__, seen)
        assert seen[0] == seen[2] == "raised"
        assert math.isclose(seen[1], math.exp(-0.2), rel_tol=1e-6)
PYTHON
then
    tail -n 20 "$folder/log" >&2  # Of which the errors that are expected are part.
    exit 1
fi
