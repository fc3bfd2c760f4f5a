#!/usr/bin/env bash
# Versions   torchdiffeq 0.2.5, torch 2.13.0, Python 3.11, CPU.
#
# Behaviour  A hook on a parameter (`tensor.register_hook`) that changes its gradient, to
#            scale or to clip it, is called once under `odeint`. Under `odeint_adjoint` it
#            is called at every evaluation of the backward solve, on each contribution,
#            and again on their sum, so that what it does is done twice: a hook that
#            doubles the gradient makes it four times as large.
#
# Output     odeint: called 1 times, gradient 2.0 of that without a hook
#            odeint_adjoint: called 17 times, gradient 4.0 of that without a hook
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 torchdiffeq==0.2.5 numpy

"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torchdiffeq


class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, t, y):
        return self.linear(y)


field = Field()
times = torch.tensor([0.0, 1.0])
options = {"step_size": 0.25}
for solve, most_calls, times_larger in (
    (torchdiffeq.odeint, 1, 2.0),
    (torchdiffeq.odeint_adjoint, None, 4.0),
):
    calls = []

    def gradient():
        field.zero_grad()
        ys = solve(field, torch.ones(1, 2), times, method="rk4", options=options)
        ys[-1].sum().backward()
        return field.linear.weight.grad.clone()

    plain = gradient()
    hook = field.linear.weight.register_hook(lambda g: calls.append(1) or 2 * g)
    hooked = gradient()
    hook.remove()
    ratio = float((hooked.sum() / plain.sum()).round(decimals=3))
    print(f"{solve.__name__}: called {len(calls)} times, gradient {ratio} of that without a hook")
    assert ratio == times_larger
    assert len(calls) == 1 if most_calls else len(calls) > 2
PYTHON
