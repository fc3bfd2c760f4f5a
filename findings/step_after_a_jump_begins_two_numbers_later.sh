#!/usr/bin/env bash
# Versions   diffrax 0.7.2, jax 0.10.2, equinox 0.13.8, Python 3.11, CPU.
#
# Behaviour  The steps of a solve need not cover its interval. With
#            `ClipStepSizeController(jump_ts=...)` the step before a jump ends at the
#            number before it, and the next one begins at the number after it, with the
#            state that the first one ended with: what lies between these two numbers
#            is stepped over by no step. So a list of times, one for each step, does not
#            say which intervals were stepped over; each has two ends of its own. (It is
#            on purpose: the field is asked for no value at the jump.)
#
# Output     3 steps, stepped over by none between them: [0. 3.]
#            ends at 0.49999997, begins at 0.50000006
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    jax==0.10.2 diffrax==0.7.2 equinox==0.13.8
cat > "$folder/program.py" <<'PROGRAM'
import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

intervals = []


class NotedHeun(dfx.Heun):
    """Heun's method, which notes what it steps over."""

    def step(self, terms, t0, t1, *rest):
        note = lambda t0, t1: intervals.append((t0.item(), t1.item()))
        jax.debug.callback(note, t0, t1)
        return super().step(terms, t0, t1, *rest)


solution = dfx.diffeqsolve(
    dfx.ODETerm(lambda t, y, args: jnp.where(t < 0.5, 1.0, -1.0)),
    NotedHeun(),
    t0=0.0,
    t1=1.0,
    dt0=0.2,
    y0=jnp.zeros(()),
    stepsize_controller=dfx.ClipStepSizeController(
        dfx.PIDController(rtol=1e-3, atol=1e-3), jump_ts=jnp.array([0.5])
    ),
)
jax.effects_barrier()
assert len(intervals) == solution.stats["num_accepted_steps"]
intervals.sort()
starts, ends = np.array(intervals, np.float32).T
between = (starts[1:] - ends[:-1]) / np.spacing(np.float32(0.49))
print(f"{len(intervals)} steps, stepped over by none between them: {between}")
print(f"ends at {ends[:-1][between > 0][0]:.8f}, begins at {starts[1:][between > 0][0]:.8f}")
assert (between > 0).sum() == 1
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
