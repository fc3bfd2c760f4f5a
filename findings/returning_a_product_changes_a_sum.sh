#!/usr/bin/env bash
# Versions   jax 0.10.2 (jaxlib 0.10.2), numpy 2.3.5, Python 3.11, a CPU with FMA (x86-64).
#
# Behaviour  Under `jax.jit` on CPU the bits of one output depend on what else a program
#            returns. With `c` the rounded product, `a*b - c` is zero in all of 1,000
#            elements if `a*b` is returned beside it, and in none if it is not: then the
#            product is contracted with the sum to one operation, which rounds once, and
#            the difference is the product's round-off. Nothing says so in the jaxpr,
#            which has the same two equations for the sum. A function that is evaluated
#            again elsewhere, where another of its intermediate values is needed (its
#            derivative, say), need not return what it returned before.
#            Adding a zero that is a run-time argument to the product, `a*b + o`, makes
#            both programs agree: contracted or not, that is the rounded product.
#
# Output     not zero: 1000 of 1000 alone, 0 with the product returned
#            with `a*b + o` in its place: 0 alone, 0 with the product returned
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    jax==0.10.2 numpy==2.3.5
cat > "$folder/program.py" <<'PROGRAM'
import jax
import numpy as np

rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 1000)).astype(np.float32)
c = a * b
zero = np.float32(0)


def not_zero(fn):
    return int((np.asarray(jax.jit(fn)(a, b, c, zero)) != 0).sum())


alone = not_zero(lambda a, b, c, o: a * b - c)
both = jax.jit(lambda a, b, c, o: (a * b - c, a * b))(a, b, c, zero)
beside = int((np.asarray(both[0]) != 0).sum())
print(f"not zero: {alone} of 1000 alone, {beside} with the product returned")
assert (alone, beside) == (1000, 0)

alone = not_zero(lambda a, b, c, o: a * b + o - c)
both = jax.jit(lambda a, b, c, o: (a * b + o - c, a * b))(a, b, c, zero)
beside = int((np.asarray(both[0]) != 0).sum())
print(f"with `a*b + o` in its place: {alone} alone, {beside} with the product returned")
assert (alone, beside) == (0, 0)
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
