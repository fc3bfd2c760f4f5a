"""Evaluations that give the same bits wherever they stand.

XLA may compile one function differently in two programs, fusing it with what comes
before and after, and round it differently. Undoing a step exactly needs the increment
to the bit. So each evaluation is made a computation of its own:

- It is one branch of a conditional on a predicate that is always true, but only known
  at run time. Nothing is fused across its boundary. (Optimisation barriers and loops of
  one trip do not isolate: XLA removes them before it fuses.)
- Both passes compile the same branch. It returns what is met on the way to the value
  and needed for the pull-back, and both passes keep that alive by letting the result
  depend on an element of each, else what is unused would be pruned. (If there is much
  of it, in a branch that is not taken: each device may have a part.) What is merely an
  input, parameters above all, is not returned (that would copy it).
- Of what is met as little is kept as can be, `residuals.py`. What follows from that,
  and what is not met on the way, as the cosine that a sine is pulled back by, is made
  outside, by the backward pass alone: its bits do not matter to the state.
- In the branch, what is dear and needed several times is written to memory, for it to
  be evaluated once, `written.py`.
- The pull-back has to wait for the evaluation: a compiler that is free to begin with
  what both do not share keeps the buffers of the one beside those of the other.
- In the branch, products are rounded by themselves, `rounding.py`. Where a loop is one
  kernel, `one_kernel.py`, the branch is compiled with all that stands around it, and
  whether a product is contracted with a sum depends on what else needs it. So it is
  where numbers are made again, which are to have the bits that they had.
- Under `vmap` the predicate stays a single one; a batched conditional would become a
  selection, which isolates nothing.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .compat import CHECKPOINT
from .one_kernel import is_complex, keeps_out_of_kernels
from .programs import bytes_of, equations_of, plain
from .residuals import CERTAIN, halves_of
from .rounding import with_rounded_products
from .run_time import nothing_like, run_time_zero
from .written import is_dear, with_dear_written, written_out


class Evaluation(NamedTuple):
    """What `fn(x, rest)` returned, a pair of a differentiable value and anything else,
    and the pull-back from a cotangent of the value to one of `x`."""

    value: PyTree[Array]
    other: PyTree[Any]
    pull: Callable[[PyTree[Array]], tuple[PyTree[Array]]]
    residuals: list[Array] | None = None
    """What was computed for the pull-back alone: with the same `fn`, `x` and `rest` it
    is had again from these, by [`pull_back_again`][]. `None` if none were asked for."""


Function = Callable[[Any, Any], tuple[PyTree[Array], PyTree[Any]]]


def evaluate(fn: Function, x: PyTree[Array], rest: PyTree) -> Evaluation:
    """Evaluates `fn(x, rest)`, with `x` a tree of inexact arrays."""
    value, pull, other = jax.vjp(lambda x: fn(x, rest), x, has_aux=True)
    return Evaluation(value, other, pull)


def _worth_keeping(primitive, *_, **__) -> bool:
    return primitive.name not in CERTAIN


def _thrifty(fn: Function) -> Function:
    """`fn` with few residuals of the loops in it, into which `halves_of` does not
    look."""

    def of_both(x, rest):
        few = jax.checkpoint(
            lambda x: fn(x, rest), policy=_worth_keeping, prevent_cse=False
        )
        return few(x)

    return of_both


def _has_complex(jaxpr: Any) -> bool:
    """Whether any variable is complex, in inner programs too."""
    variables = [*jaxpr.invars, *jaxpr.constvars]
    for equation in equations_of(jaxpr):
        variables += equation.outvars
    return any(map(is_complex, variables))


def evaluate_isolated(
    fn: Function, x: PyTree[Array], rest: PyTree, run_time: Array
) -> Evaluation:
    """`evaluate(fn, x, rest)`, with the same bits wherever it stands.

    **Arguments:** as for `evaluate`, with all that `fn` depends on in `x` and `rest`;
    `run_time`, an array of numbers not known before run time, such as a time.
    """
    program = _program_of(fn, x, rest)
    zero = run_time_zero(run_time)
    in_kernel = program.suits_kernels
    rounds = in_kernel or program.second is not None
    compute = _computing(program.jaxpr, in_kernel=in_kernel, rounds=rounds)
    nothing = lambda *_: [nothing_like(x) for x in program.jaxpr.out_avals]
    new = lax.cond(zero > -1, compute, nothing, zero, *program.operands)
    many = program.bytes_of_residuals >= _MANY_BYTES
    needing = _zero_that_needs(new, zero, in_branch=many)
    new = _with_first_plus(needing, new)
    evaluation = program.evaluation(new, zero)
    if not many:
        return evaluation
    return evaluation._replace(pull=jtu.Partial(_pull_after, evaluation.pull, needing))


_LARGE = 256
"""From which size on of an array it takes less time to write it than to evaluate again
something dear, where it is not written within a kernel."""


def _computing(
    program: Any, *, in_kernel: bool, rounds: bool
) -> Callable[..., list[Array]]:
    """What a branch is to compute, of a zero and the operands; with products rounded
    by themselves, if it `rounds`."""
    written = with_dear_written(program, 1 if in_kernel else _LARGE)

    def compute(zero, *xs):
        fn, args = (program, xs) if written is None else (written, [zero, *xs])
        if rounds:
            return with_rounded_products(fn, zero, args)
        return jax.extend.core.jaxpr_as_fun(fn)(*args)

    return compute


def _residuals(program: Any, zero: Array, args: Sequence[Array]) -> list[Array]:
    """What `program` makes of arguments, written to memory. In one kernel it would
    share what it can with the results, whose products are then others that are needed
    once; of arguments times one it can share nothing."""
    is_real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    times_one = lambda x: x * (1 + zero).astype(x.dtype) if is_real(x) else x
    residuals = with_rounded_products(program, zero, [*map(times_one, args)])
    return written_out(residuals, zero)


def _pull_after(pull: Callable, zero: Array, ct: PyTree[Array]) -> Any:
    """`pull`, which seems to depend on `zero`: what it could begin with before that is
    known would lie in memory beside what is evaluated."""
    return pull(jtu.tree_map(lambda ct: ct + zero.astype(ct.dtype), ct))


def evaluate_with_residuals(fn: Function, x: PyTree[Array], rest: PyTree) -> Evaluation:
    """`evaluate(fn, x, rest)`, with its residuals."""
    program = _program_of(fn, x, rest)
    new = jax.extend.core.jaxpr_as_fun(program.jaxpr)(*program.operands)
    # A zero that is known rounds nothing: nor was anything rounded in `new`.
    return program.evaluation(new, jnp.zeros(()))


def pull_back_again(
    fn: Function,
    x: PyTree[Array],
    rest: PyTree,
    residuals: list[Array],
    run_time: Array,
) -> Evaluation:
    """The pull-back of `evaluate_isolated(fn, x, rest, run_time)`, or of
    `evaluate_with_residuals(fn, x, rest)`, from the residuals of that: nothing is
    evaluated. The value is not known, only what it looks like."""
    program = _program_of(fn, x, rest)
    results = [jnp.zeros(x.shape, x.dtype) for x in program.results]
    return program.evaluation([*results, *residuals], run_time_zero(run_time))


class _Program(NamedTuple):
    """An evaluation, as a program for what is computed in it, and what is made of that
    and of the operands."""

    jaxpr: Any
    """Returns the results and what is kept for the residuals."""
    second: Any
    """Makes the residuals of the operands and of what is kept; `None` if that is what
    they are."""
    operands: list[Array]
    others: Evaluation
    """What are no arrays."""
    treedef: Any
    """Of the arrays."""
    sources: list[int | None]
    """Which of the operands each array is; `None` if it is computed."""
    kinds: list[Any]  # Which implementation of random keys, of arrays that are keys.
    num_results: int
    """How many of them are of the value and what is beside it, which come first."""

    @property
    def suits_kernels(self) -> bool:
        return not any(map(keeps_out_of_kernels, equations_of(self.jaxpr.jaxpr)))

    @property
    def results(self) -> list[Any]:
        """What is computed of these."""
        number = sum(i is None for i in self.sources[: self.num_results])
        return self.jaxpr.out_avals[:number]

    @property
    def bytes_of_residuals(self) -> int:
        return bytes_of(self.jaxpr.out_avals[len(self.results) :])

    @property
    def keeps_of_loops(self) -> bool:
        """Whether anything that is kept was met in a loop."""
        made = {
            id(x)
            for equation in self.jaxpr.eqns
            for x in equation.outvars
            if equation.primitive.name in _LOOPS
        }
        kept = self.jaxpr.jaxpr.outvars[len(self.results) :]
        return any(id(x) in made for x in kept)

    def evaluation(self, new: Sequence[Array], zero: Array) -> Evaluation:
        """Of what was computed. `zero` is not known before run time."""
        computed, number = iter(new), len(self.results)
        if self.second is not None:
            dear = self.suits_kernels and is_dear(self.second)
            made = _residuals if dear else with_rounded_products
            rest = made(self.second, zero, [*self.operands, *new[number:]])
            computed = iter([*new[:number], *rest])
        leaves = [
            _from_raw(next(computed), kind) if i is None else self.operands[i]
            for i, kind in zip(self.sources, self.kinds, strict=True)
        ]
        evaluation = eqx.combine(self.treedef.unflatten(leaves), self.others)
        return evaluation._replace(residuals=list(new[number:]))


_MANY_BYTES = 2**13
"""Of residuals, for a pull-back to wait for: of fewer, in one kernel, it takes time."""


_LOOPS = frozenset({"scan", "while", "cond"})


def _program_of(fn: Function, x: PyTree[Array], rest: PyTree) -> _Program:
    as_it_is = _program_as_it_is(fn, x, rest)
    if not as_it_is.keeps_of_loops:
        return as_it_is
    fn, plain = _traced(fn, x, rest)
    # `jax.checkpoint` would repeat side effects, such as printing, cannot keep complex
    # numbers, and keeps by its policy what one inside it was not to keep.
    names = {x.primitive.name for x in equations_of(plain.jaxpr)}
    if plain.effects or _has_complex(plain.jaxpr) or CHECKPOINT in names:
        return as_it_is
    programs = as_it_is, _program_as_it_is(_thrifty(fn), x, rest)
    return min(programs, key=lambda program: program.bytes_of_residuals)


def _program_as_it_is(fn: Function, x: PyTree[Array], rest: PyTree) -> _Program:
    arrays, static = eqx.partition((x, rest), eqx.is_array)
    operands, treedef = jtu.tree_flatten(arrays)
    noted: list = []

    def run(fn, *operands):
        x, rest = eqx.combine(treedef.unflatten(operands), static)
        evaluation = evaluate(fn, x, rest)
        arrays, others = eqx.partition(evaluation, eqx.is_array)
        leaves, leaves_treedef = jtu.tree_flatten(arrays)
        # Tracers, so that what is the same is identical.
        sources = [_position(leaf, operands) for leaf in leaves]
        kinds = [jax.random.key_impl(x) if _is_key(x) else None for x in leaves]
        num_results = len(jtu.tree_leaves(arrays[:2]))
        noted.append((others, leaves_treedef, sources, kinds, num_results))
        return [_raw(x) for x, i in zip(leaves, sources, strict=True) if i is None]

    jaxpr = jax.make_jaxpr(ft.partial(run, fn))(*operands)
    jaxpr = plain(jaxpr)
    program = _Program(jaxpr, None, operands, *noted[-1])
    halves = halves_of(program.jaxpr, len(program.results))
    if halves is None:
        return program
    return program._replace(jaxpr=halves.first, second=halves.second)


def _traced(fn: Function, x: PyTree[Array], rest: PyTree) -> tuple[Function, Any]:
    """`fn`, which is not called again, and its program."""
    jaxpr, shapes, static = eqx.filter_make_jaxpr(fn)(x, rest)
    treedef = jtu.tree_structure(shapes)

    def of_program(x, rest):
        arrays = jtu.tree_leaves(eqx.filter((x, rest), eqx.is_array))
        out = jax.extend.core.jaxpr_as_fun(jaxpr)(*arrays)
        return eqx.combine(treedef.unflatten(out), static)

    return of_program, jaxpr


def _position(x: Array, among: Sequence[Array]) -> int | None:
    return next((i for i, y in enumerate(among) if x is y), None)


def _zero_that_needs(xs: Sequence[Array], zero: Array, *, in_branch: bool) -> Array:
    """A zero that seems to depend on an element of each: by a branch that is not taken,
    or by a selection, for which all devices wait for the one that has the element."""
    kinds = [x.dtype for x in xs[:1] if jnp.issubdtype(x.dtype, jnp.inexact)]
    nothing = jnp.zeros((), jnp.finfo(*kinds or [jnp.float32]).dtype)
    # Not of `x.ravel()`: an array laid out over devices would be gathered.
    element = lambda x: jnp.real(x[(0,) * x.ndim]).astype(nothing.dtype)
    all_of = lambda *xs: sum(element(x) for x in xs if x.size > 0)
    if in_branch:
        # Of all that the conditional gave, whose table of addresses is used again.
        return lax.cond(zero > -1, lambda *_: nothing, all_of, *xs)
    # Of the others; by a selection, since nothing times an element might be NaN.
    return jnp.where(zero > -1, nothing, all_of(*xs[1:]))


def _with_first_plus(zero: Array, xs: Sequence[Array]) -> list[Array]:
    filled = [i for i, x in enumerate(xs) if x.size > 0]
    of = lambda i, x: x + zero.astype(x.dtype) if i in filled[:1] else x
    return [of(i, x) for i, x in enumerate(xs)]


def _raw(x: Array) -> Array:
    """`x`, if it is of random keys their bits."""
    return jax.random.key_data(x) if _is_key(x) else x


def _from_raw(raw: Array, kind: Any) -> Array:
    """Undoes `_raw`."""
    return raw if kind is None else jax.random.wrap_key_data(raw, impl=kind)


def _is_key(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
