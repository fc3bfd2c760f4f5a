"""Solvers and adjoints may be keys, and static fields, as some packages have them."""

import diffrax as dfx
import equinox as eqx
import jax.tree_util as jtu
import pytest

import reversax as rvx

# Two functions that make equal things would be one: each is made twice by the same.
MAKERS = {
    "Symmetric": rvx.Symmetric,
    "Symmetric-number": lambda: rvx.Symmetric(halvings_per_step=1 / 16),
    "McCallumFoster": rvx.McCallumFoster,
    "McCallumFoster-number": lambda: rvx.McCallumFoster(0.99),
    "FixedPoint": rvx.FixedPoint,
    "FixedPoint-number": lambda: rvx.FixedPoint(largest=100.0),
    "FloatingPoint": rvx.FloatingPoint,
    "Reversible": lambda: rvx.Reversible(dfx.Tsit5()),
    "Reversible-options": lambda: rvx.Reversible(
        dfx.HalfSolver(dfx.Euler()), rvx.Symmetric(2), rvx.FixedPoint(largest=100.0)
    ),
    "Reversible-published": lambda: rvx.Reversible(dfx.Tsit5(), rvx.McCallumFoster()),
    "ReversibleAdjoint": rvx.ReversibleAdjoint,
    "ReversibleAdjoint-options": lambda: rvx.ReversibleAdjoint(
        1e-3, 5, dfx.TextProgressMeter()
    ),
}


class Holder(eqx.Module):
    held: object = eqx.field(static=True)


@pytest.mark.parametrize("name", MAKERS)
def test_equal_ones_have_equal_hashes_and_others_are_other_keys(name):
    make = MAKERS[name]
    assert make() == make()
    assert hash(make()) == hash(make())
    keys = {other(): other_name for other_name, other in MAKERS.items()}
    assert len(keys) == len(MAKERS)
    assert keys[make()] == name


@pytest.mark.parametrize("name", MAKERS)
def test_a_static_field_that_is_equal_is_not_traced_again(name):
    make, traced = MAKERS[name], []

    @eqx.filter_jit
    def compiled(holder):
        traced.append(holder)
        return None

    for _ in range(2):
        compiled(Holder(make()))
    assert len(traced) == 1
    assert jtu.tree_structure(Holder(make())) == jtu.tree_structure(Holder(make()))
