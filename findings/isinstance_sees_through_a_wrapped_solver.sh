#!/usr/bin/env bash
# Versions   diffrax 0.7.2, jax 0.10.2, equinox 0.13.8, Python 3.11.
#
# Behaviour  `isinstance(solver, cls)` is true of a wrapped Diffrax solver if it is true
#            of the solver within, whatever the wrapper is. `HalfSolver(Tsit5())` is an
#            instance of `Tsit5` and of `AbstractERK`, though neither is among the bases
#            of its class, and though it has no `tableau`, which every `AbstractERK` has.
#            So a check by `isinstance` does not promise the attributes of the class;
#            `issubclass(type(solver), cls)` does.
#
# Output     isinstance of Tsit5: True, of AbstractERK: True
#            class below AbstractERK: False, has a tableau: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    jax==0.10.2 diffrax==0.7.2 equinox==0.13.8
cat > "$folder/program.py" <<'PROGRAM'
import diffrax as dfx

half = dfx.HalfSolver(dfx.Tsit5())
plain, tableaus = isinstance(half, dfx.Tsit5), isinstance(half, dfx.AbstractERK)
print(f"isinstance of Tsit5: {plain}, of AbstractERK: {tableaus}")
below, has = issubclass(type(half), dfx.AbstractERK), hasattr(half, "tableau")
print(f"class below AbstractERK: {below}, has a tableau: {has}")
assert plain and tableaus
assert not below and not has
assert hasattr(dfx.Tsit5(), "tableau")
PROGRAM
"$folder/venv/bin/python" "$folder/program.py"
