"""Reversible solvers for PyTorch: torchdiffeq's call, exact gradients, flat memory."""

from ._odeint import odeint as odeint, odeint_adjoint as odeint_adjoint

__version__ = "0.1.0"
