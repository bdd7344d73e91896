"""Sixteen or more numbers at once in Numba kernels: LLVM's vectors as values, with the usual operators.

A vector holds 8, 16, 32 or 64 numbers of one type. `load16(array, i)` takes array[i : i + 16] of a contiguous
one-dimensional array, **unchecked**: kernels see to it that all of it may be read, or written by `store`. Operators
work lane by lane, integers wrap around, a plain number on the right means that number in every lane. `<`, `>`, `>=` and
`==` give masks. Floating point is IEEE 754 to the bit, so vectors give what a loop would.

`WIDE` says whether the processor that is compiled for has what `gather`, `expand`, `compress`, `rotated` and `lookup`
are made of (AVX-512 F, BW, DQ, VL); kernels with those exist beside plain ones, which is what runs elsewhere. Raises
nothing at run time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel, register_default
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

_FEATURES = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
WIDE = {"+avx512f", "+avx512bw", "+avx512dq", "+avx512vl"} <= _FEATURES
_AVX2 = "+avx2" in _FEATURES

Vector = Any
"""What a kernel's vectors and masks are to a type checker."""

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


class VectorType(types.Type):
    """element: NumPy's name of a dtype, or "mask"."""

    def __init__(self, element: str, count: int) -> None:
        self.element, self.count = element, count
        self.floating, self.signed = element.startswith("float"), element.startswith("int")
        self.bits = 1 if element == "mask" else np.dtype(element).itemsize * 8
        super().__init__(name=f"Vector({count} x {element})")

    @property
    def llvm(self) -> Any:
        if self.floating:
            return ir.VectorType(ir.FloatType() if self.bits == 32 else ir.DoubleType(), self.count)
        return ir.VectorType(ir.IntType(self.bits), self.count)

    @property
    def suffix(self) -> str:
        """What LLVM appends to the names of its functions."""
        return f"v{self.count}{'f' if self.floating else 'i'}{self.bits}"


@register_default(VectorType)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, vector: VectorType) -> None:
        super().__init__(manager, vector, vector.llvm)


def _inline(function: Callable[..., Any]) -> Any:
    """What becomes a few instructions in the kernel that calls it."""
    return intrinsic(function)


def _overload(of: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        return overload(of, strict=False)(function)

    return decorate


Generator = Callable[[Any, list[Any]], Any]
"""(LLVM's builder, arguments) → the result."""


def _signature(result: Any, arguments: Sequence[Any], generate: Generator) -> tuple[Any, Any]:
    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return generate(builder, list(values))

    return result(*arguments), codegen


def _constant(vector: VectorType, numbers: Sequence[int]) -> Any:
    return ir.Constant(vector.llvm, list(numbers))


def _indices(numbers: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(numbers)), list(numbers))


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _check(array: Any) -> None:
    if not isinstance(array, types.Array) or array.ndim != 1 or array.layout != "C":
        raise TypingError(f"{array} is no contiguous one-dimensional array")


def _data(context: Any, builder: Any, array: Any, value: Any) -> Any:
    return cgutils.create_struct_proxy(array)(context, builder, value).data


def _loading(count: int) -> Any:
    @_inline
    def load(_typing: Any, array: Any, index: Any) -> Any:
        _check(array)
        vector = VectorType(str(array.dtype), count)

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            place = context.cast(builder, values[1], signature.args[1], types.intp)
            pointer = builder.gep(_data(context, builder, array, values[0]), [place])
            loaded = builder.load(builder.bitcast(pointer, vector.llvm.as_pointer()))
            loaded.align = array.dtype.bitwidth // 8
            return loaded

        return vector(array, index), codegen

    return load


load8, load16, load32, load64 = _loading(8), _loading(16), _loading(32), _loading(64)


@_inline
def store(_typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """array[index : index + n] = vector, whose integers are cut to the array's width if they are wider."""
    _check(array)
    kept = VectorType(str(array.dtype), vector.count)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = context.cast(builder, values[1], signature.args[1], types.intp)
        pointer = builder.gep(_data(context, builder, array, values[0]), [place])
        value = _converted(builder, values[2], vector, kept)
        stored = builder.store(value, builder.bitcast(pointer, kept.llvm.as_pointer()))
        stored.align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, index, vector), codegen


@_inline
def gather(_typing: Any, array: Any, index: Any) -> Any:
    """array[i] for the 16 u32 below 2³¹ of `index`; array of u32."""
    _check(array)
    vector = VectorType("uint32", 16)

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        base = builder.bitcast(_data(context, builder, array, values[0]), ir.IntType(8).as_pointer())
        every = ir.Constant(ir.VectorType(ir.IntType(1), 16), [1] * 16)
        arguments = [_constant(vector, [0] * 16), base, values[1], every, ir.Constant(_I32, 4)]
        return _call(builder, "llvm.x86.avx512.mask.gather.dpi.512", vector.llvm, arguments)

    return vector(array, index), codegen


# ---- conversions -----------------------------------------------------------------------------------------------------


def _converted(builder: Any, value: Any, old: VectorType, new: VectorType) -> Any:
    if old.floating and new.floating:
        return (
            value if old.bits == new.bits else (builder.fpext if new.bits == 64 else builder.fptrunc)(value, new.llvm)
        )
    if old.floating:
        return (builder.fptosi if new.signed else builder.fptoui)(value, new.llvm)
    if new.floating:
        return (builder.sitofp if old.signed else builder.uitofp)(value, new.llvm)
    if old.bits >= new.bits:
        return value if old.bits == new.bits else builder.trunc(value, new.llvm)
    return (builder.sext if old.signed else builder.zext)(value, new.llvm)


def _converting(element: str) -> Any:
    @_inline
    def convert(_typing: Any, vector: Any) -> Any:
        new = VectorType(element, vector.count)
        return _signature(new, [vector], lambda builder, v: _converted(builder, v[0], vector, new))

    return convert


as_u8, as_u16, as_u32 = _converting("uint8"), _converting("uint16"), _converting("uint32")
as_i8, as_i16, as_i32 = _converting("int8"), _converting("int16"), _converting("int32")
as_f32, as_f64 = _converting("float32"), _converting("float64")


@_inline
def as_those_of(_typing: Any, array: Any, vector: Any) -> Any:
    """The vector's numbers as those of the array."""
    new = VectorType(str(array.dtype), vector.count)
    return _signature(new, [array, vector], lambda builder, v: _converted(builder, v[1], vector, new))


def _viewing(element: str) -> Any:
    @_inline
    def view(_typing: Any, vector: Any) -> Any:
        bits = np.dtype(element).itemsize * 8
        new = VectorType(element, vector.count * vector.bits // bits)
        return _signature(new, [vector], lambda builder, v: builder.bitcast(v[0], new.llvm))

    return view


bits_of_f32, f32_of_bits, pairs_of_i8 = _viewing("uint32"), _viewing("float32"), _viewing("int16")
"""The same bits as other numbers."""


@_inline
def splat(_typing: Any, like: Any, number: Any) -> Any:
    """A vector as `like`, of one number, which becomes one of its type."""

    def generate(builder: Any, values: list[Any]) -> Any:
        nothing = ir.Constant(like.llvm, ir.Undefined)
        first = builder.insert_element(nothing, values[1], ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, nothing, _indices([0] * like.count))

    return _signature(like, [like, getattr(types, like.element)], generate)


# ---- operators -------------------------------------------------------------------------------------------------------


def _lane_by_lane(operation: Any, apply: Any) -> None:
    """`operation` of two vectors, or a vector and a number, is `apply`, an intrinsic."""

    @_overload(operation)
    def of(a: Any, b: Any) -> Any:
        if not isinstance(a, VectorType):
            return None
        if isinstance(b, VectorType):
            return lambda a, b: apply(a, b)
        return lambda a, b: apply(a, splat(a, b))


def _arithmetic(operation: Any, signed: str, unsigned: str, floating: str | None) -> None:
    @_inline
    def apply(_typing: Any, a: Any, b: Any) -> Any:
        if a != b:
            raise TypingError(f"{operation} of {a} and {b}")
        name = floating if a.floating else signed if a.signed else unsigned
        return _signature(a, [a, b], lambda builder, v: getattr(builder, str(name))(*v))

    _lane_by_lane(operation, apply)


def _comparison(operation: Any, sign: str) -> None:
    @_inline
    def apply(_typing: Any, a: Any, b: Any) -> Any:
        if a != b:
            raise TypingError(f"{operation} of {a} and {b}")
        name = "fcmp_ordered" if a.floating else "icmp_signed" if a.signed else "icmp_unsigned"
        mask = VectorType("mask", a.count)
        return _signature(mask, [a, b], lambda builder, v: getattr(builder, name)(sign, *v))

    _lane_by_lane(operation, apply)


for _operation, _names in {
    operator.add: ("add", "add", "fadd"),
    operator.sub: ("sub", "sub", "fsub"),
    operator.mul: ("mul", "mul", "fmul"),
    operator.truediv: ("", "", "fdiv"),
    operator.and_: ("and_", "and_", None),
    operator.or_: ("or_", "or_", None),
    operator.lshift: ("shl", "shl", None),
    operator.rshift: ("ashr", "lshr", None),
}.items():
    _arithmetic(_operation, *_names)
for _operation, _sign in {operator.lt: "<", operator.gt: ">", operator.ge: ">=", operator.eq: "=="}.items():
    _comparison(_operation, _sign)


def _paired_products(builder: Any, a: Any, b: Any) -> Any:
    """a(2i) · b(2i) + a(2i + 1) · b(2i + 1) of 2 · n int16, int32 [n]; n: 8 or 16."""
    n = a.type.count // 2
    result = ir.VectorType(_I32, n)
    if WIDE and n == 16:
        return _call(builder, "llvm.x86.avx512.pmaddw.d.512", result, [a, b])
    if _AVX2 and n == 8:
        return _call(builder, "llvm.x86.avx2.pmadd.wd", result, [a, b])
    if _AVX2:
        halves = [_indices(list(range(first, first + n))) for first in (0, n)]
        low, high = (
            _paired_products(builder, builder.shuffle_vector(a, a, half), builder.shuffle_vector(b, b, half))
            for half in halves
        )
        return builder.shuffle_vector(low, high, _indices(list(range(n))))

    def part(vector: Any, start: int) -> Any:
        every_other = _indices(list(range(start, 2 * n, 2)))
        return builder.sext(builder.shuffle_vector(vector, vector, every_other), result)

    even, odd = (builder.mul(part(a, i), part(b, i)) for i in (0, 1))
    return builder.add(even, odd)


# ---- masks -----------------------------------------------------------------------------------------------------------


@_inline
def select(_typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask is set, else b."""
    if a != b:
        raise TypingError(f"choice between {a} and {b}")
    return _signature(a, [mask, a, b], lambda builder, v: builder.select(*v))


@_inline
def both(_typing: Any, a: Any, b: Any) -> Any:
    return _signature(a, [a, b], lambda builder, v: builder.and_(*v))


@_inline
def bits_of(_typing: Any, mask: Any) -> Any:
    """The mask as u64, lane i in bit i."""

    def generate(builder: Any, values: list[Any]) -> Any:
        bits = builder.bitcast(values[0], ir.IntType(mask.count))
        return bits if mask.count == 64 else builder.zext(bits, _I64)

    return _signature(types.uint64, [mask], generate)


@_inline
def lowest_bit(_typing: Any, bits: Any) -> Any:
    """Its number; bits: u64, not 0."""
    return _signature(types.int64, [bits], lambda builder, v: builder.cttz(v[0], ir.Constant(ir.IntType(1), 1)))


@_inline
def count_bits(_typing: Any, bits: Any) -> Any:
    return _signature(types.int64, [bits], lambda builder, v: builder.ctpop(v[0]))


def _moving(name: str) -> Any:
    @_inline
    def move(_typing: Any, mask: Any, vector: Any) -> Any:
        def generate(builder: Any, values: list[Any]) -> Any:
            arguments = [values[1], _constant(vector, [0] * vector.count), values[0]]
            return _call(builder, f"llvm.x86.avx512.mask.{name}.{vector.suffix}", vector.llvm, arguments)

        return _signature(vector, [mask, vector], generate)

    return move


expand, compress = _moving("expand"), _moving("compress")
"""(mask, vector of 16 u32): its first numbers to where the mask is set; those where the mask is set to the front."""


# ---- between lanes ---------------------------------------------------------------------------------------------------


@_inline
def lookup(_typing: Any, low: Any, index: Any, high: Any) -> Any:
    """(low, high)[index mod 64], all of 32 u16."""
    return _signature(
        low,
        [low, index, high],
        lambda builder, v: _call(builder, "llvm.x86.avx512.vpermi2var.hi.512", low.llvm, v),
    )


@_inline
def rotated(_typing: Any, vector: Any, by: Any) -> Any:
    """vector[(lane + by) mod 16], of 16 u32; by: an integer."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        number = context.cast(builder, values[1], signature.args[1], types.uint32)
        nothing = ir.Constant(vector.llvm, ir.Undefined)
        first = builder.insert_element(nothing, number, ir.Constant(_I32, 0))
        index = builder.add(
            builder.shuffle_vector(first, nothing, _indices([0] * 16)), _constant(vector, list(range(16)))
        )
        return _call(builder, "llvm.x86.avx512.permvar.si.512", vector.llvm, [values[0], index])

    return vector(vector, by), codegen


@_inline
def joined(_typing: Any, a: Any, b: Any) -> Any:
    """One vector of the lanes of a, then b."""
    whole = VectorType(a.element, 2 * a.count)
    lanes = _indices(list(range(whole.count)))
    return _signature(whole, [a, b], lambda builder, v: builder.shuffle_vector(v[0], v[1], lanes))


def _halving(which: int) -> Any:
    @_inline
    def half(_typing: Any, vector: Any) -> Any:
        count = vector.count // 2
        lanes = _indices(list(range(which * count, which * count + count)))
        part = VectorType(vector.element, count)
        return _signature(part, [vector], lambda builder, v: builder.shuffle_vector(v[0], v[0], lanes))

    return half


low_half, high_half = _halving(0), _halving(1)


def _crossing(distance: int) -> Any:
    @_inline
    def cross(_typing: Any, vector: Any) -> Any:
        count = vector.count

        def generate(builder: Any, values: list[Any]) -> Any:
            x = values[0]
            other = builder.shuffle_vector(x, x, _indices([i ^ distance for i in range(count)]))
            # A product with ±1 is exact, so this rounds once, as a sum or a difference does.
            signs = ir.Constant(vector.llvm, [-1.0 if i & distance else 1.0 for i in range(count)])
            return _call(builder, f"llvm.fma.{vector.suffix}", vector.llvm, [x, signs, other])

        return _signature(vector, [vector], generate)

    return cross


cross8, cross4, cross2, cross1 = _crossing(8), _crossing(4), _crossing(2), _crossing(1)
"""x(i), x(i + h) ← x(i) + x(i + h), x(i) − x(i + h) for the lanes i with bit h clear, of floating-point numbers."""


@_inline
def first_lane(_typing: Any, vector: Any) -> Any:
    number = getattr(types, vector.element)
    return _signature(number, [vector], lambda builder, v: builder.extract_element(v[0], ir.Constant(_I32, 0)))
