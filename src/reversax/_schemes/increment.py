r"""The base solver's step as an increment: `Psi_{t1 - t0}(t0, y)`.

A base solver is an explicit one-step method `y -> y + Psi_h(t, y)`. For a Butcher
tableau `(a, b, c)` of `s` stages, with `contr(t0, t1)` the control over the step (`h`
for an ODE) and `vf_prod(t, y, control)` the vector field applied to it,

    (RK1)  Y_i = y + sum_{j<i} a_ij k_j
    (RK2)  k_i = vf_prod(t0 + c_i (t1 - t0), Y_i, contr(t0, t1))
    (RK3)  Psi = sum_i b_i k_i
    (RK4)  error estimate = sum_i e_i k_i

Backward steps are the same formulas with `t1 < t0` and the control of the reversed path
(`control.py`), which is evaluated once for both halves of a reversible step. Only
stages that some requested sum depends on are evaluated: without an error estimate or
dense output Tsit5 takes 6. The stages behind (RK3) are evaluated first, by themselves.

A compiler fuses unrolled stages, and evaluates what it has fused anew for each element
that is read. Of a stencil, which reads several of `Y_i` for one of `k_i`, that adds up
to a power of the number of stages. So there each `Y_i` is written to memory.

Every other explicit solver goes through its own `step`, begun afresh each time, since a
state carried over from the other twin would belong to another point:

    (S)    Psi = step(t0, t1, y) - y
"""

import abc
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, PyTree

from .._numbers.arithmetic import State, scaled
from .._xla.closure import closed
from .._xla.run_time import run_time_zero
from .._xla.written import written_out
from .control import Control, Leg, Time, controls_of, over_leg, whole_leg
from .problem import is_of_diffrax
from .stages import written_from


class Advance(NamedTuple):
    """What one evaluation of an increment gives."""

    increment: State
    """`Psi`, shaped like the state."""
    error: State | None
    """The embedded error estimate, shaped like the state; `None` if the base has none
    or none was asked for."""
    dense_info: PyTree[Array]
    """What the base's `interpolation_cls` needs; `None` if not asked for."""


class Core(NamedTuple):
    """The part of an evaluation that reversing a step needs."""

    increment: State
    rest: PyTree[Any]
    """What was met on the way: stages, or whatever a solver returned."""
    result: dfx.RESULTS | None
    """`None` if it is known beforehand to be successful."""


class AbstractIncrement(eqx.Module):
    """`Psi` of one base solver, for given terms and arguments.

    It is evaluated in two stages, of which the first is all that reversing a step
    needs, and the second may be asked for in one pass and not in the other.
    """

    contr: eqx.AbstractVar[Callable[[Time, Time], Control]]
    """The control of the step from one time to a later one."""
    may_move: eqx.AbstractVar[bool]
    """Whether a step of no length might not return its state, for all that is known."""
    is_short: ClassVar[bool] = False
    axes: ClassVar[None] = None
    """As of [`Fields`][], where it is no part of them."""

    @abc.abstractmethod
    def core(self, leg: Leg, y: State, *, extends: bool, lanes: int = 1) -> Core:
        """Evaluates `Psi_{t1 - t0}(t0, y)`, over a leg from `t0` to `t1`, in
        either direction.

        `extends` says whether the error estimate or dense output may be asked for, and
        `lanes` of how many this is one that are evaluated together.
        """

    def core_from(self, leg: Leg, y: State, first: State, *, lanes: int) -> Core:
        """The same, given the vector field times the control at the start of the leg,
        which need not be evaluated again."""
        return self.core(leg, y, extends=False, lanes=lanes)

    @abc.abstractmethod
    def extend(
        self, leg: Leg, y: State, core: Core, *, error: bool, dense: bool
    ) -> Advance:
        """Adds the error estimate and the dense output, as asked for."""

    def __call__(self, leg: Leg, y: State, *, error: bool, dense: bool) -> Advance:
        core = self.core(leg, y, extends=error or dense)
        return self.extend(leg, y, core, error=error, dense=dense)

    @property
    def evaluates_once(self) -> bool:
        """Whether the core is known to take one evaluation of the vector field."""
        return False

    def is_certain(self, which: int) -> bool:
        """Whether a field has the same bits wherever it stands, but for a contraction
        of what it returns."""
        return False

    def of_no_length(self, t: Time, y: State) -> State:
        """`Psi` of a step of no length, which should be zero."""
        leg = whole_leg(t, t, self.contr(t, t))
        return self.core(leg, y, extends=False).increment

    @abc.abstractmethod
    def close(self, t: Time, y: State) -> "AbstractIncrement":
        """The same increment with all the arrays it depends on among its own leaves.

        Parameters that a vector field closes over become leaves like any other, so
        that a custom derivative rule can see them. The vector field is traced once,
        here, however often the increment is used. `t` and `y` are examples.
        """


@dataclasses.dataclass(frozen=True)
class Tableau:
    """The explicit Butcher tableau `(a, b, e, c)` of (RK1) to (RK4); hashable."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...] | None
    c: tuple[float, ...]

    def stages_behind(self, *weights: tuple[float, ...] | None) -> frozenset[int]:
        """The stages that sums with these weights depend on, or that those do."""
        behind = set()
        for i in reversed(range(len(self.b))):
            direct = any(w is not None and w[i] != 0 for w in weights)
            if direct or any(self.a[j][i] != 0 for j in behind):
                behind.add(i)
        return frozenset(behind)


_EULER = Tableau(a=((),), b=(1.0,), e=None, c=(0.0,))


def _tableau(solver: dfx.AbstractSolver) -> Tableau | None:
    """The tableau of a solver whose `step` is known to follow one, else `None`.

    By exact type: `isinstance` looks through wrappers such as `HalfSolver`.
    """
    if type(solver) is dfx.Euler:
        return _EULER
    if not issubclass(type(solver), dfx.AbstractERK):
        return None
    step = inspect.getattr_static(type(solver), "step")
    if step is not inspect.getattr_static(dfx.AbstractERK, "step"):
        return None
    tableau = getattr(solver, "tableau", None)
    if not isinstance(tableau, dfx.ButcherTableau) or tableau.implicit:
        return None
    as_floats = lambda xs: tuple(float(x) for x in np.asarray(xs))
    return Tableau(
        a=((), *map(as_floats, tableau.a_lower)),
        b=as_floats(tableau.b_sol),
        e=as_floats(tableau.b_error),
        c=(float(tableau.c1), *as_floats(tableau.c)),
    )


def is_tableau(solver: dfx.AbstractSolver) -> bool:
    """Whether the increment of a solver is known to be (RK1) to (RK3)."""
    return _tableau(solver) is not None


def _weighted_sum(weights: Sequence[float], ks: dict[int, State]) -> State:
    """`sum_i weights_i k_i` over the non-zero weights."""
    terms = [(w, ks[i]) for i, w in enumerate(weights) if w != 0]
    if not terms:
        return jtu.tree_map(jnp.zeros_like, next(iter(ks.values())))
    weighted = [jtu.tree_map(lambda k, w=w: scaled(k, w), k) for w, k in terms]
    return jtu.tree_map(lambda *xs: sum(xs[1:], start=xs[0]), *weighted)


def _add(y: State, increment: State) -> State:
    return jtu.tree_map(lambda a, b: a + b, y, increment)


def check_like_state(k: State, y: State) -> None:
    # Leaf by leaf: a user's own tree need not know when it equals another.
    describe = lambda tree: [
        f"{jtu.keystr(path) or 'y'}: {jnp.result_type(x)}{list(jnp.shape(x))}"
        for path, x in jtu.tree_leaves_with_path(tree)
    ]
    got, expected = describe(k), describe(y)
    if jtu.tree_structure(k) != jtu.tree_structure(y) or got != expected:
        raise ValueError(
            "Cast inside the vector field, or pass a `y0` of the wider dtype: the "
            "vector field times the control must have the structure, shapes and dtypes "
            f"of the state, which has {expected}, and the vector field gave {got}. "
            "(`reversax.Reversible(...)`)"
        )


class TableauIncrement(AbstractIncrement):
    """(RK1) to (RK4) with unrolled stages."""

    contr: Callable
    vf_prod: Callable
    tableau: Tableau = eqx.field(static=True)
    keeps_stages: bool = eqx.field(static=True)
    writes_from: int | None = eqx.field(default=None, static=True)
    """From which size of a state on the arguments of the vector field are written to
    memory, if at all."""
    may_move: ClassVar[bool] = False

    @property
    def evaluates_once(self) -> bool:
        return len(self.tableau.stages_behind(self.tableau.b)) == 1

    def writes_stages(self, y: State, lanes: int) -> bool:
        """Whether they are, of so many lanes."""
        size = sum(x.size for x in jtu.tree_leaves(y))
        return self.writes_from is not None and size * lanes >= self.writes_from

    def _add_stages(
        self,
        ks: dict[int, State],
        needed: frozenset[int],
        leg: Leg,
        y: State,
        lanes: int = 1,
    ) -> None:
        """Evaluates those of the needed stages that are not yet in `ks`."""
        t0, t1 = leg.start, leg.end
        for i in sorted(needed - ks.keys()):
            stage_weights = self.tableau.a[i]
            y_i = y
            if any(stage_weights):
                y_i = _add(y, _weighted_sum(stage_weights, ks))  # (RK1)
                # Else `jax.checkpoint` would keep every term of the sum instead.
                y_i = jtu.tree_map(lambda x: checkpoint_name(x, "stage"), y_i)
            c = self.tableau.c[i]
            # Not t0 + 1*(t1 - t0), which may miss t1 by an ulp.
            t_i = t1 if c == 1 else (t0 if c == 0 else t0 + c * (t1 - t0))
            if i > 0 and self.writes_stages(y, lanes):
                y_i = written_out(y_i, run_time_zero(jnp.asarray(t1)))
            ks[i] = self.vf_prod(t_i, y_i, leg.control)  # (RK2)
            check_like_state(ks[i], y)

    def core(self, leg: Leg, y: State, *, extends: bool, lanes: int = 1) -> Core:
        increment, ks = self._core({}, leg, y, lanes)
        return Core(increment, ks if extends else {}, None)

    def core_from(self, leg: Leg, y: State, first: State, *, lanes: int) -> Core:
        known = {0: first} if self.tableau.c[0] == 0 else {}
        return Core(self._core(known, leg, y, lanes)[0], {}, None)

    def _core(
        self, ks: dict[int, State], leg: Leg, y: State, lanes: int
    ) -> tuple[State, dict[int, State]]:
        needed = self.tableau.stages_behind(self.tableau.b)
        self._add_stages(ks, needed, leg, y, lanes)
        return _weighted_sum(self.tableau.b, ks), ks  # (RK3)

    def extend(
        self, leg: Leg, y: State, core: Core, *, error: bool, dense: bool
    ) -> Advance:
        tableau, ks = self.tableau, dict(core.rest)
        with_stages = dense and self.keeps_stages
        needed = tableau.stages_behind(
            tableau.e if error else None,
            (1.0,) * len(tableau.b) if with_stages else None,
        )
        self._add_stages(ks, needed, leg, y)
        estimate = None
        if error and tableau.e is not None:
            estimate = _weighted_sum(tableau.e, ks)  # (RK4)
        dense_info = None
        if dense:
            dense_info = dict(y0=y, y1=_add(y, core.increment))
            if with_stages:
                stages = [ks[i] for i in range(len(tableau.b))]
                dense_info["k"] = jtu.tree_map(lambda *k: jnp.stack(k), *stages)
        return Advance(core.increment, estimate, dense_info)

    def close(self, t: Time, y: State) -> "TableauIncrement":
        contr = closed(self.contr, t, t)
        control = eqx.filter_eval_shape(self.contr, t, t)
        vf_prod = closed(self.vf_prod, t, y, control)
        return TableauIncrement(
            contr=contr,
            vf_prod=vf_prod,
            tableau=self.tableau,
            keeps_stages=self.keeps_stages,
            writes_from=written_from(vf_prod),
        )


class StepIncrement(AbstractIncrement):
    """(S): the increment of any explicit one-step solver."""

    contr: Callable
    step: Callable
    may_move: bool = eqx.field(static=True)

    def core(self, leg: Leg, y: State, *, extends: bool, lanes: int = 1) -> Core:
        y1, estimate, dense_info, result = self.step(leg, y)
        increment = jtu.tree_map(lambda a, b: a - b, y1, y)  # (S)
        if not extends:
            estimate, dense_info = None, None
        return Core(increment, (estimate, dense_info), result)

    def extend(
        self, leg: Leg, y: State, core: Core, *, error: bool, dense: bool
    ) -> Advance:
        estimate, dense_info = core.rest
        return Advance(
            core.increment,
            estimate if error else None,
            dense_info if dense else None,
        )

    def close(self, t: Time, y: State) -> "StepIncrement":
        contr = closed(self.contr, t, t)
        control = eqx.filter_eval_shape(self.contr, t, t)
        leg = whole_leg(t, t, control)
        step = closed(self.step, leg, y)
        return StepIncrement(contr=contr, step=step, may_move=self.may_move)


def make_increment(
    solver: dfx.AbstractSolver, terms: PyTree[dfx.AbstractTerm], args: PyTree
) -> AbstractIncrement:
    """The increment of `solver` for these terms and arguments."""
    tableau = _tableau(solver)
    if tableau is not None:
        return TableauIncrement(
            contr=lambda t0, t1: terms.contr(t0, t1),
            vf_prod=lambda t, y, control: terms.vf_prod(t, y, args, control),
            tableau=tableau,
            keeps_stages=type(solver) is not dfx.Euler,
        )

    def step(leg, y):
        known = over_leg(solver, terms, leg)
        t0, t1 = leg.start, leg.end
        solver_state = solver.init(known, t0, t1, y, args)
        y1, estimate, dense_info, _, result = solver.step(
            known, t0, t1, y, args, solver_state, False
        )
        known_result = None if result is dfx.RESULTS.successful else result
        return y1, estimate, dense_info, known_result

    contr = lambda t0, t1: controls_of(terms, t0, t1)
    may_move = not is_of_diffrax(solver)
    return StepIncrement(contr=contr, step=step, may_move=may_move)
