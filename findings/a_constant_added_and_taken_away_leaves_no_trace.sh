#!/usr/bin/env bash
# Versions   jax 0.10.2 (jaxlib 0.10.2), numpy 2.3.5, Python 3.11, on CPU.
#
# Behaviour  Under `jax.jit`, `(x + c) - c` with a constant `c` is `x`: XLA adds the two
#            constants to each other first, though floating-point sums are not
#            associative and no option for that was set. So the classic way to round to
#            an integer, with `c = 1.5 * 2**52`, does not round, and returns 0.3 for 0.3;
#            op by op it does, and so does the same program where `c` is an argument.
#            `(c - (x + c)) + x`, the rounding error of the sum, is left alone.
#
# Output     op by op 0.0, compiled 0.3, compiled with c as an argument 0.0
#            rounding error of the sum: op by op 0.3, compiled 0.3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    jax==0.10.2 numpy==2.3.5
cat > "$folder/program.py" <<'PROGRAM'
import jax
import numpy as np

jax.config.update("jax_enable_x64", True)
c = np.float64(1.5 * 2**52)
x = np.float64(0.3)


def rounded(x):
    return (x + c) - c


def error(x):
    return (c - (x + c)) + x


alone, compiled = float(rounded(x)), float(jax.jit(rounded)(x))
argument = float(jax.jit(lambda x, c: (x + c) - c)(x, c))
print(f"op by op {alone}, compiled {compiled}, compiled with c as an argument {argument}")
assert (alone, compiled, argument) == (0.0, 0.3, 0.0)
alone, compiled = float(error(x)), float(jax.jit(error)(x))
print(f"rounding error of the sum: op by op {alone}, compiled {compiled}")
assert (alone, compiled) == (0.3, 0.3)
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
