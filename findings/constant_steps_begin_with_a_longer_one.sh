#!/usr/bin/env bash
# Versions   diffrax 0.7.2, jax 0.10.2, equinox 0.13.8, Python 3.11, CPU.
#
# Behaviour  `ConstantStepSize` takes steps that are not all as long, where `dt0` does
#            not divide the time of the solve: the first is `dt0`, and the ends of all
#            others are shares of the whole time, whose number of steps is rounded up.
#            So the second step is the shortest, not the last. What reads states at equal
#            distances (a multistep method, a difference of outputs saved at steps) is
#            wrong there, and nothing else shows it.
#
# Output     ends of steps: [0.3, 0.5, 0.75, 1.0]     (from 0 to 1 with `dt0=0.3`)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    diffrax==0.7.2 jax==0.10.2 jaxlib==0.10.2 equinox==0.13.8

"$folder/venv/bin/python" - <<'PYTHON'
import diffrax
import jax
import numpy as np

jax.config.update("jax_enable_x64", True)
solution = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, y, args: -y),
    diffrax.Euler(),
    t0=0.0,
    t1=1.0,
    dt0=0.3,
    y0=1.0,
    stepsize_controller=diffrax.ConstantStepSize(),
    saveat=diffrax.SaveAt(steps=True),
    max_steps=8,
)
ends = np.asarray(solution.ts)
ends = ends[np.isfinite(ends)]
print("ends of steps:", [float(round(t, 12)) for t in ends])
assert np.allclose(ends, [0.3, 0.5, 0.75, 1.0], atol=1e-12)
PYTHON
