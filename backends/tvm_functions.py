"""exp, erf, tanh, sigmoid and small powers in float32 as arithmetic, which vectorises.

LLVM has no vector form of these and calls the C library once an element. Here, with u = x^2:

    exp(x)      2^n p(r),  n = rint(x / ln 2),  r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2]
    erf(x)      x P(u) / Q(u) for |x| < 3.92, and 1 beyond
    tanh(x)     x P(u) / Q(u) for |x| < 9.01, and 1 beyond
    sigmoid(x)  1 / (1 + exp(-x))
    pow(x, n)   x x, x x x, x x x x for n = 2, 3, 4

p is a polynomial of degree 7; P / Q are minimax fits of the relative error. The largest relative
errors in float32 over all arguments: exp 1e-7, sigmoid 2e-7, erf and tanh 4e-7, that is, 1 to 6
units in the last place. Infinities and NaN come out as they should; exp underflows gradually.

Limits: float32 alone; other types keep the library's functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

_EXP = [1.0 / math.factorial(k) for k in range(7, -1, -1)]
"""Taylor coefficients: on |r| < 0.35 the first one left out is below 1e-8."""
_LN2_HIGH = 0.693359375
"""ln 2 in 10 bits: its products with exponents are exact."""
_LN2_LOW = math.log(2.0) - _LN2_HIGH
_ROUND = 12582912.0
"""1.5 * 2^23: added and taken away it rounds to the nearest integer, which its low bits hold."""
_BIAS = 127

_ERF = (
    3.92,
    (1.12837911, 0.199925642, 0.0505734982, 0.00370165111, 0.00014185081, -1.95782458e-06,
     1.99240201e-08),
    (1.0, 0.510511143, 0.114998891, 0.0143533043, 0.000956046672),
)  # fmt: skip
_TANH = (
    9.01,
    (0.999999993, 0.130835864, 0.00310348197, 1.11493131e-05, -2.0204706e-08, 5.26790579e-11,
     -8.46245499e-14),
    (1.0, 0.464169134, 0.0244932926, 0.00025454527),
)  # fmt: skip


def with_arithmetic(function: Any) -> Any:
    """A ``PrimFunc`` whose float32 calls of exp, erf, tanh and sigmoid are arithmetic."""
    import tvm_ffi
    from tvm.ir import Call, Op

    forms = {Op.get(f"tirx.{name}"): form for name, form in _FORMS.items()}
    power = Op.get("tirx.pow")
    fresh = itertools.count()

    def replace(call: Any) -> Any:
        form = forms.get(call.op) or (_power(call) if call.op.same_as(power) else None)
        if form is None or str(getattr(call.ty, "dtype", call.ty)) != "float32":
            return call
        return form(call.args[0], _Names(fresh))

    body = tvm_ffi.structural_map(function.body, (Call, replace), order="post")
    return function.with_body(body)


class _Names:
    """Values computed once and named, so that no expression is written out twice."""

    def __init__(self, fresh: itertools.count[int]) -> None:
        self._fresh = fresh
        self._bound: list[tuple[Any, Any]] = []

    def bind(self, value: Any) -> Any:
        """A variable for a value."""
        from tvm import tirx

        variable = tirx.Var(f"f{next(self._fresh)}", value.ty)
        self._bound.append((variable, value))
        return variable

    def close(self, result: Any) -> Any:
        """The result under all bindings."""
        from tvm import tirx

        for variable, value in reversed(self._bound):
            result = tirx.Let(variable, value, result)
        return result


def _number(value: float) -> Any:
    from tvm import tirx

    return tirx.const(value, "float32")


def _clamped(x: Any, low: float, high: float, names: _Names) -> Any:
    """NaN stays: it is neither below nor above."""
    from tvm import tirx

    above = names.bind(tirx.Select(x < _number(low), _number(low), x))
    return names.bind(tirx.Select(above > _number(high), _number(high), above))


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    """Horner's rule, the highest power first."""
    result = _number(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + _number(coefficient)
    return result


def _power_of_two(n: Any) -> Any:
    from tvm import tirx

    exponent = (n + tirx.const(_BIAS, "int32")) << tirx.const(23, "int32")
    return tirx.reinterpret("float32", exponent)


def _exp(x: Any, names: _Names) -> Any:
    from tvm import tirx

    x = _clamped(names.bind(x), -104.0, 89.0, names)
    shifted = names.bind(x * _number(1 / math.log(2.0)) + _number(_ROUND))
    n = names.bind(shifted - _number(_ROUND))
    r = names.bind(x - n * _number(_LN2_HIGH) - n * _number(_LN2_LOW))
    bits = tirx.reinterpret("int32", shifted)
    whole = names.bind(bits - tirx.reinterpret("int32", _number(_ROUND)))
    # two factors: one alone cannot reach denormal numbers nor infinity
    half = names.bind(whole >> tirx.const(1, "int32"))
    scaled = _polynomial(r, _EXP) * _power_of_two(half)
    return names.close(scaled * _power_of_two(whole - half))


def _ratio(
    limit: float, above: Sequence[float], below: Sequence[float]
) -> Callable[[Any, _Names], Any]:
    def form(x: Any, names: _Names) -> Any:
        x = _clamped(names.bind(x), -limit, limit, names)
        u = names.bind(x * x)
        ratio = x * _polynomial(u, above[::-1]) / _polynomial(u, below[::-1])
        return names.close(_clamped(names.bind(ratio), -1.0, 1.0, names))

    return form


def _sigmoid(x: Any, names: _Names) -> Any:
    one = _number(1.0)
    power = _exp(_number(0.0) - x, names)
    return one / (one + power)


def _power(call: Any) -> Callable[[Any, _Names], Any] | None:
    """Repeated multiplication, where the exponent is a small whole number."""
    from tvm import tirx

    exponent = call.args[1]
    if not isinstance(exponent, tirx.FloatImm) or float(exponent.value) not in (2.0, 3.0, 4.0):
        return None
    count = int(exponent.value)

    def form(x: Any, names: _Names) -> Any:
        x = names.bind(x)
        square = names.bind(x * x)
        return names.close({2: square, 3: square * x, 4: square * square}[count])

    return form


_FORMS: dict[str, Callable[[Any, _Names], Any]] = {
    "exp": _exp,
    "erf": _ratio(*_ERF),
    "tanh": _ratio(*_TANH),
    "sigmoid": _sigmoid,
}

__all__: Sequence[str] = ("with_arithmetic",)
