#!/usr/bin/env bash
# Versions   diffrax 0.7.2, jax 0.10.2, equinox 0.13.8, Python 3.11, CPU.
#
# Behaviour  Where a vector field stops being a number (here sqrt(1 - t) from t = 1 on),
#            `PIDController` without `dtmin` rejects and shortens steps until the next
#            one ends where it begins, `t + dt == t`. Such a step has no length, so that
#            the field is only asked where it is still a number, its error estimate is
#            zero and it is *accepted*; and a factor times no length is no length. The
#            controller accepts steps of no length from there on until `max_steps`, and
#            the result is `max_steps_reached`: neither that `dt` became too small nor
#            that anything was not a number. Whoever raises `max_steps`, as that
#            message says, pays for more of them.
#
# Output     accepted 4008, rejected 88, of no length 3952
#            result: The maximum number of solver steps was reached. Try increasing `max_steps`.
#            with `dtmin` not forced: The minimum step size was reached in the
#            differential equation solver. (after 81 steps)
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

jax.config.update("jax_enable_x64", True)


def solve(**options):
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: jnp.sqrt(1 - t)),
        dfx.Tsit5(),
        t0=0.0,
        t1=2.0,
        dt0=None,
        y0=jnp.array(0.0),
        stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-9, **options),
        saveat=dfx.SaveAt(steps=True),
        throw=False,
        max_steps=4096,
    )


solution = solve()
accepted = int(solution.stats["num_accepted_steps"])
rejected = int(solution.stats["num_rejected_steps"])
times = solution.ts[:accepted]
without_length = int((jnp.diff(times) == 0).sum())
print(f"accepted {accepted}, rejected {rejected}, of no length {without_length}")
print("result:", dfx.RESULTS[solution.result])
assert solution.result == dfx.RESULTS.max_steps_reached
assert without_length > 3900
assert 1 - 1e-12 < float(times[-1]) < 1 + 1e-12

bounded = solve(dtmin=1e-9, force_dtmin=False)
steps = int(bounded.stats["num_steps"])
print(f"with `dtmin` not forced: {dfx.RESULTS[bounded.result]} (after {steps} steps)")
assert bounded.result == dfx.RESULTS.dt_min_reached
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
