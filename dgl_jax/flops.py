"""The floating-point operations of a function, counted in the program that JAX makes of it.

XLA counts them too, but its count depends on what is counted for: a CUDA or TPU backend has none
before it compiles, a CPU has its own forms of a convolution (`models.convolution`), and a loop
counts as one turn of it. This count is the same on every host: that of the forms that run anywhere
but on a CPU, a loop's as often as it turns.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

# They move numbers, or make them.
_NO_FLOPS = {
    "broadcast_in_dim", "concatenate", "copy", "device_put", "dynamic_slice",
    "dynamic_update_slice", "gather", "iota", "optimization_barrier", "pad", "platform_index",
    "random_bits", "random_fold_in", "random_seed", "random_split", "random_unwrap", "random_wrap",
    "reshape", "rev", "sharding_constraint", "slice", "split", "squeeze", "transpose",
}  # fmt: skip
# Which XLA counts apart from FLOPs.
_TRANSCENDENTAL = {
    "atan2", "cbrt", "cos", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow",
    "rsqrt", "sin", "sqrt", "tan", "tanh",
}  # fmt: skip


def flops(fn: Callable, *args: Any) -> float:
    """The floating-point operations of ``fn(*args)``, without running it.

    A multiply-add is two; zeros that pad a convolution take none. Any other operation is one for
    each number that it makes, or that it sums; exp, tanh and their like are none, nor is what only
    moves numbers. Of a condition's branches the costliest counts; a loop whose number of turns
    depends on the data, once.

    Args:
      fn: a function that JAX can trace.
      *args: its arguments, arrays or their shapes.

    Returns:
      The number of operations.

    Example:
      >>> x = jax.ShapeDtypeStruct((3, 4), "float32")
      >>> flops(lambda x: (x + x) @ x.T, x)  # 12 additions, and 9 sums of 4 products.
      84.0

    Source: the rules of XLA's HloCostAnalysis, which come to the same numbers.
    """
    return float(_program_flops(jax.make_jaxpr(fn)(*args).jaxpr))


def _program_flops(program: core.Jaxpr) -> int:
    """Without the equations that no output needs, which a compiler leaves out."""
    needed, total = set(_variables(program.outvars)), 0
    for equation in reversed(program.eqns):
        if equation.effects or needed.intersection(equation.outvars):
            needed.update(_variables(equation.invars))
            total += _flops_of(equation)
    return total


def _variables(atoms: Sequence[core.Var | core.Literal]) -> list[core.Var]:
    return [atom for atom in atoms if isinstance(atom, core.Var)]


def _shape(atom: core.Var | core.Literal) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())  # A token has none.


def _flops_of(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    shapes = [_shape(atom) for atom in equation.invars]
    made = max((math.prod(_shape(variable)) for variable in equation.outvars), default=0)
    if name in _NO_FLOPS or name in _TRANSCENDENTAL:
        return 0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * made * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        return 2 * _convolution_products(*shapes, _shape(equation.outvars[0]), **params)
    if "window_dimensions" in params:  # A pool, or a max pool's gradient, which adds once more.
        num_windows, size = min(made, math.prod(shapes[0])), math.prod(params["window_dimensions"])
        return num_windows * (size if name == "select_and_scatter_add" else size - 1)
    if name.startswith(("reduce_", "arg")) and name != "reduce_precision":
        return max(0, math.prod(shapes[0]) - made)
    inner = [_program_flops(program) for program in core.jaxprs_in_params(params)]
    if name == "cond":  # Of forms for several platforms the last is that of all others.
        return inner[-1] if params.get("branches_platforms") else max(inner)
    if inner:
        return sum(inner) * params.get("length", 1)
    return made


def _convolution_products(
    x_shape, kernel_shape, y_shape, *, dimension_numbers, window_strides, padding, lhs_dilation,
    rhs_dilation, batch_group_count, **_,
) -> int:  # fmt: skip
    """How many products of an input's number and a weight a convolution sums."""
    x_spec, kernel_spec, y_spec = dimension_numbers
    products = x_shape[x_spec[0]] // batch_group_count
    products *= math.prod(kernel_shape[axis] for axis in kernel_spec[:2])
    for place, (x_axis, kernel_axis, y_axis) in enumerate(
        zip(x_spec[2:], kernel_spec[2:], y_spec[2:], strict=True)
    ):
        x_place = (
            np.arange(y_shape[y_axis])[:, None] * window_strides[place]
            + np.arange(kernel_shape[kernel_axis]) * rhs_dilation[place]
            - padding[place][0]
        )
        number, turn = np.divmod(x_place, lhs_dilation[place])
        products *= int(np.sum((turn == 0) & (number >= 0) & (number < x_shape[x_axis])))
    return products
