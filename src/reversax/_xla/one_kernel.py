"""Loops compiled into one kernel, where the state is small.

On CPU, XLA runs each instruction of a loop by itself, some 0.1 us each, unless all that
the loop's body reads and writes is less than 1,024 bytes: then it compiles the loop
into one kernel (`small_while_loop_hoisting_pass.cc`), of which a step costs no more
than its arithmetic. The body of a reversible step has a hundred instructions, and lies
above that even for a state of two numbers.

What makes a loop one kernel is an attribute of the call that it is moved into. Here
loops are called in this way from the beginning, and get the attribute if they hold
nothing that such a kernel cannot have (an allowlist of operations) and nothing that is
better run by itself (large arrays, products of matrices, which go to a library or to
several threads). Anything else is compiled as ever; the numbers are the same.

A kernel's inputs must all be read by it. Whatever XLA makes of a loop, one tuple of
them is, so that is what the call is given.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func, stablehlo
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from .compat import ONE_KERNEL, compiles_small_calls, number_of_devices

_SWITCH = "REVERSAX_ONE_KERNEL"

# Without what depends on other devices, calls back, or is left to a library; and not
# functions that have other bits in a vector than alone (`tan`, `atan`, `cbrt`): which
# elements of an array are taken together may differ from kernel to kernel.
_ALLOWED = frozenset(
    f"{dialect}.{name}"
    for dialect, names in {
        "stablehlo": (
            "abs add and bitcast_convert broadcast_in_dim case ceil clamp "
            "compare concatenate constant convert cosine count_leading_zeros divide "
            "dot_general dynamic_slice dynamic_update_slice exponential "
            "exponential_minus_one floor gather get_tuple_element iota is_finite log "
            "log_plus_one logistic maximum minimum multiply negate not "
            "optimization_barrier or pad popcnt power reduce reduce_precision "
            "remainder reshape return reverse round_nearest_afz round_nearest_even "
            "rsqrt scatter select shift_left shift_right_arithmetic "
            "shift_right_logical sign sine slice sqrt subtract tanh transpose while "
            "xor"
        ),
        "chlo": (
            "acosh asinh atanh cosh erf erf_inv erfc is_inf is_neg_inf is_pos_inf "
            "lgamma next_after sinh square"
        ),
        "func": "call return",
    }.items()
    for name in names.split()
)

_NOT_TOGETHER = {"stablehlo.dot_general", "stablehlo.gather"}
"""Beside a gather the product of a matrix and a vector has other bits in one pass than
in the other."""

_MOST_BYTES = 2**17
"""Of an array that is computed in a loop."""
_MOST_BYTES_REDUCED = 2**13
"""Of one that is summed up: from twice that on it is left to a library."""
_MOST_BYTES_OF = {"stablehlo.sine": 2**11, "stablehlo.cosine": 2**11}
"""Of one of which a kernel computes the elements one by one."""
_MOST_OPERATIONS = 10_000
"""So that compiling takes no longer."""


def _bytes_of(kind: Any) -> int:
    kind = ir.RankedTensorType(kind)
    size = 1
    for length in kind.shape:
        size *= length
    width = getattr(kind.element_type, "width", 64)
    return size * max(8, width) // 8


def _is_vector_product(operation: Any) -> bool:
    """Of at least one vector, and no batch of them."""
    return any(ir.RankedTensorType(x.type).rank <= 1 for x in operation.operands)


# Those that hand on a whole array, of which they read or write a part in place.
_IN_PLACE = frozenset(
    {"stablehlo.dynamic_update_slice", "stablehlo.while", "stablehlo.case", "func.call"}
)


def is_complex(variable: Any) -> bool:
    """Whether a variable of a jaxpr is."""
    dtype = getattr(variable.aval, "dtype", None)  # (Not all kinds have one.)
    return dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)


def _has_complex_result(operation: Any) -> bool:
    # The products inside a complex one cannot be rounded by themselves.
    kinds = [getattr(x.type, "element_type", None) for x in operation.results]
    return any(isinstance(kind, ir.ComplexType) for kind in kinds)


def keeps_out_of_kernels(equation: Any) -> bool:
    """Whether the loop with this equation of a jaxpr in it cannot be one kernel."""
    name, kinds = equation.primitive.name, [x.aval for x in equation.invars]
    if any(map(is_complex, equation.outvars)):
        return True
    if name == "dot_general":
        return all(x.ndim > 1 for x in kinds)
    if name == "mul":
        return max(x.size * x.dtype.itemsize for x in kinds) > _MOST_BYTES
    return False  # (Not all kinds have a size.)


def _suits(operation: Any) -> bool:
    """Whether an operation may be part of a kernel, and is better there."""
    name = operation.name
    if name not in _ALLOWED or _has_complex_result(operation):
        return False
    if name == "stablehlo.dot_general":
        operands = [_bytes_of(x.type) for x in operation.operands]
        if not _is_vector_product(operation) or max(operands) > _MOST_BYTES:
            return False
    if name == "stablehlo.scatter":
        indices = ir.RankedTensorType(operation.operands[1].type)
        return indices.rank <= 1  # One place, to be written in place.
    if name == "stablehlo.reduce":
        return _bytes_of(operation.operands[0].type) <= _MOST_BYTES_REDUCED
    if name in _IN_PLACE:
        return True
    most = _MOST_BYTES_OF.get(name, _MOST_BYTES)
    return all(_bytes_of(x.type) <= most for x in operation.results)


def _operations_of(root: Any, table: Any, seen: set[str]) -> Iterator[Any]:
    """The operations of a function and of those that it calls."""
    for region in root.regions:
        for block in region:
            for view in block:
                operation = view.operation
                yield operation
                if operation.name == "func.call":
                    name = _callee(operation)
                    if name not in seen:
                        seen.add(name)
                        yield from _operations_of(table[name].operation, table, seen)
                yield from _operations_of(operation, table, seen)


def _callee(call: Any) -> str:
    return ir.FlatSymbolRefAttr(call.attributes["callee"]).value


def _all_suit(call: Any, table: Any) -> bool:
    name = _callee(call)
    operations = _operations_of(table[name].operation, table, {name})
    names = set()
    for number, operation in enumerate(operations):
        if number >= _MOST_OPERATIONS or not _suits(operation):
            return False
        names.add(operation.name)
    return not names >= _NOT_TOGETHER


def _call_of(values: tuple) -> Any:
    """The call that returned all of these, if one did."""
    owners = [x.owner for x in values]
    if not owners or any(isinstance(x, ir.Block) for x in owners):
        return None
    call = owners[0].operation
    same = all(x.operation == call for x in owners)
    return call if same and call.name == "func.call" else None


def _lower(ctx, *values):
    call, module = _call_of(values), ctx.module_context
    wanted = os.environ.get(_SWITCH, "1") != "0" and compiles_small_calls()
    if call is None or not wanted or number_of_devices(module) != 1:
        return list(values)
    table = ir.SymbolTable(module.module.operation)
    if not _all_suit(call, table):
        return list(values)
    results = list(call.results)
    elements = _with_tuples(call, module.module)
    return [elements[results.index(x)] for x in values]


def _elements(values: Any, number: int) -> list:
    integer = ir.IntegerType.get_signless(32)
    at = lambda i: ir.IntegerAttr.get(integer, i)
    return [stablehlo.get_tuple_element(values, at(i)) for i in range(number)]


def _with_tuples(call: Any, module: Any) -> list[Any]:
    """The results of a call, with the attribute, of the same function by way of one
    that takes and returns a tuple; the first call is left unused, to be removed by the
    compiler."""
    operands, kinds = list(call.operands), [x.type for x in call.results]
    numbers = _Numbers(kinds)

    def body(taken):
        inner = func.CallOp(
            kinds, call.attributes["callee"], _elements(taken, len(operands))
        )
        return stablehlo.tuple(numbers.together(list(inner.results)))

    returned = ir.TupleType.get_tuple(numbers.kinds_together)
    taken = stablehlo.tuple(operands)
    kernel = marked_call(
        body, taken, returned, name="one_kernel", marks=ONE_KERNEL, module=module
    )
    return numbers.apart(_elements(kernel.results[0], len(numbers.kinds_together)))


class _Numbers:
    """The single numbers among values of these types, in one array of each type: each
    array has an address, and takes 64 bytes."""

    def __init__(self, kinds: list[Any]):
        self.kinds = [ir.RankedTensorType(kind) for kind in kinds]
        places: dict[str, list[int]] = {}
        for i, kind in enumerate(self.kinds):
            if kind.rank == 0:
                places.setdefault(str(kind), []).append(i)
        self.groups = [group for group in places.values() if len(group) > 1]
        self.alone = sorted({*range(len(kinds))}.difference(*self.groups))

    def _of(self, group: list[int], length: int) -> Any:
        return ir.RankedTensorType.get([length], self.kinds[group[0]].element_type)

    @property
    def kinds_together(self) -> list[Any]:
        arrays = [self._of(group, len(group)) for group in self.groups]
        return [*(self.kinds[i] for i in self.alone), *arrays]

    def together(self, values: list[Any]) -> list[Any]:
        flat = lambda group: [
            stablehlo.reshape(self._of(group, 1), values[i]) for i in group
        ]
        arrays = [stablehlo.concatenate(flat(group), 0) for group in self.groups]
        return [*(values[i] for i in self.alone), *arrays]

    def apart(self, values: list[Any]) -> list[Any]:
        out = dict(zip(self.alone, values, strict=False))
        arrays = values[len(self.alone) :]
        at = ir.DenseI64ArrayAttr.get
        for group, array in zip(self.groups, arrays, strict=True):
            for k, i in enumerate(group):
                number = stablehlo.slice(array, at([k]), at([k + 1]), at([1]))
                out[i] = stablehlo.reshape(self.kinds[i], number)
        return [out[i] for i in range(len(self.kinds))]


def marked_call(
    body: Callable[[Any], Any],
    operand: Any,
    returned: Any,
    *,
    name: str,
    marks: dict[str, str],
    module: Any,
) -> Any:
    """A call with these frontend attributes of a new function, of which `body` makes
    the result of the operand."""
    with ir.InsertionPoint(module.body):
        kind = ir.FunctionType.get([operand.type], [returned])
        function = func.FuncOp(name, kind)
    function.attributes["sym_visibility"] = ir.StringAttr.get("private")
    ir.SymbolTable(module.operation).insert(function)
    block = function.add_entry_block()
    with ir.InsertionPoint(block):
        func.ReturnOp([body(block.arguments[0])])
    callee = ir.FlatSymbolRefAttr.get(function.name.value)
    call = func.CallOp([returned], callee, [operand]).operation
    attributes: dict[str, Any] = {k: ir.StringAttr.get(v) for k, v in marks.items()}
    call.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(attributes)
    return call


_results_p = jax.extend.core.Primitive("one_kernel_results")
_results_p.multiple_results = True
_results_p.def_impl(lambda *xs: list(xs))
_results_p.def_abstract_eval(lambda *xs: list(xs))
mlir.register_lowering(_results_p, lambda ctx, *values: list(values))
# (Not to be cached: what is called stands outside of what is lowered here.)
mlir.register_lowering(_results_p, _lower, platform="cpu", cacheable=False)


def _batch(args, dims):
    return _results_p.bind(*args), list(dims)


def _jvp(primals, tangents):
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    return _results_p.bind(*primals), _results_p.bind(*tangents)


batching.primitive_batchers[_results_p] = _batch
ad.primitive_jvps[_results_p] = _jvp


def in_one_kernel(fn: Callable[[Any], Any], x: PyTree) -> PyTree:
    """`fn(x)`, a loop, compiled into one kernel where that is possible and faster.

    **Arguments:** `fn`, a function of any tree, which may close over others; `x`, that.

    **Returns:** what `fn` returns. Where the environment has `REVERSAX_ONE_KERNEL=0`
    it is compiled as ever.
    """
    arrays, rest = eqx.partition(x, eqx.is_array)
    noted: list = []

    def of_arrays(arrays) -> PyTree[Array]:
        out = fn(eqx.combine(arrays, rest))
        arrays, others = eqx.partition(out, eqx.is_array)
        noted.append(others)
        return arrays

    def call(arrays) -> PyTree[Array]:
        leaves, treedef = jtu.tree_flatten(jax.jit(of_arrays)(arrays))
        return treedef.unflatten(_results_p.bind(*leaves))

    # In a program of its own where there is none around it.
    return eqx.combine(jax.jit(call)(arrays), noted[-1])
