#!/usr/bin/env bash
# Versions   diffrax 0.7.2, jax 0.10.2, equinox 0.13.8, Python 3.11, CPU.
#
# Behaviour  A stochastic Runge-Kutta solver of Diffrax loses half an order, and accuracy
#            by more than a factor of ten, where a solve runs backwards in time
#            (`t1 < t0`), without a word. Diffrax turns time round for such a solve, and
#            the control with it: of the path's step from s to t it negates the increment
#            W, which is right, and also the space-time area H, which is not. Time turned
#            round, H is what it was: it is the area between the path and its chord, over
#            the length of the step, and both of these change their sign.
#
# Output     W and H of a step, and of the same step run backwards:
#            -0.1775, -0.0868 and 0.1775, -0.0868
#            SRA1, root mean square errors at 16, 32 and 64 steps:
#            forwards  4.9e-04, 1.4e-04, 4.2e-05, order 1.8
#            backwards 7.4e-03, 4.4e-03, 2.0e-03, order 0.9
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


def path_of(key):
    area = dfx.SpaceTimeLevyArea
    return dfx.VirtualBrownianTree(0.0, 1.0, 2**-12, (), key, levy_area=area)


@jax.jit
@jax.vmap
def errors(key):
    """Of 16, 32 and 64 steps, forwards and backwards."""

    def solve(num_steps, t0, t1):
        drift = dfx.ODETerm(lambda t, y, args: jnp.sin(y))
        noise = dfx.ControlTerm(lambda t, y, args: jnp.array(0.5), path_of(key))
        terms, dt0 = dfx.MultiTerm(drift, noise), (t1 - t0) / num_steps
        y0 = jnp.array(1.0)
        return dfx.diffeqsolve(terms, dfx.SRA1(), t0, t1, dt0, y0, max_steps=1024).ys[0]

    times = ((0.0, 1.0), (1.0, 0.0))
    error = lambda n, t: solve(n, *t) - solve(512, *t)
    return jnp.array([[error(n, t) for n in (16, 32, 64)] for t in times])


there = path_of(jax.random.key(0)).evaluate(0.25, 0.5, use_levy=True)
back = path_of(jax.random.key(0)).evaluate(0.5, 0.25, use_levy=True)
assert jnp.allclose(back.W, -there.W) and jnp.allclose(back.H, there.H)
print("W and H of a step, and of the same step run backwards:")
print(f"{there.W:.4f}, {there.H:.4f} and {back.W:.4f}, {back.H:.4f}")

of_keys = errors(jax.random.split(jax.random.key(1), 100))
forwards, backwards = jnp.sqrt(jnp.mean(of_keys**2, axis=0))
order = lambda e: float(jnp.log2(e[0] / e[2]) / 2)
show = lambda e: ", ".join(f"{x:.1e}" for x in e) + f", order {order(e):.1f}"
print("SRA1, root mean square errors at 16, 32 and 64 steps:")
print("forwards ", show(forwards))
print("backwards", show(backwards))
assert order(forwards) > 1.4 and order(backwards) < 1.25
assert (backwards > 10 * forwards).all()
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
