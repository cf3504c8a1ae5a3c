"""Vectors of 512 bits for numba: matrix products and transposes in registers, addresses as pointers.

Numba turns loops into vectors, but keeps no tile of a product in registers. What is time here is written in
LLVM's own language; everything takes addresses and strides (in numbers), and knows nothing of their owners.
Numba's cache asks whether `losslab.engine.machine` has changed, not this file: touch that one with it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from losslab.engine.compiled import LANES

fast = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})
plain = njit(cache=True, nogil=True, error_model="numpy")

_long, _float = ir.IntType(64), ir.FloatType()
_vector = ir.VectorType(_float, LANES)


def _fused_multiply_add(module: Any) -> Any:
    name = f"llvm.fma.v{LANES}f32"
    if name in module.globals:
        return module.globals[name]
    return ir.Function(module, ir.FunctionType(_vector, [_vector] * 3), name)


def _tile(rows: int, vectors: int) -> Any:
    """The product of so many rows and so many columns in vectors, its sums held in registers throughout."""

    @intrinsic
    def tile(context, a, lda, ak, b, ldb, c, ldc, k):
        def generate(context, builder, signature, args):
            _emit_tile(builder, rows, vectors, *args)
            return context.get_dummy_value()

        n = types.int64
        return types.void(n, n, n, n, n, n, n, n), generate

    return tile


def _emit_tile(build, rows, vectors, a, lda, ak, b, ldb, c, ldc, k):
    at_a, at_b, at_c = (build.inttoptr(p, _float.as_pointer()) for p in (a, b, c))
    number = lambda value: ir.Constant(_long, value)
    fma = _fused_multiply_add(build.module)
    starts = [build.gep(at_a, [build.mul(lda, number(r))]) for r in range(rows)]
    before = build.block
    loop, after = build.append_basic_block("product"), build.append_basic_block("stored")
    build.branch(loop)
    build.position_at_end(loop)
    p = build.phi(_long)
    p.add_incoming(number(0), before)
    sums = [[build.phi(_vector) for _ in range(vectors)] for _ in range(rows)]
    places = [build.add(build.mul(p, ldb), number(LANES * j)) for j in range(vectors)]
    values = [_vector_at(build, at_b, place) for place in places]
    column, nothing = build.mul(p, ak), ir.Constant(_vector, ir.Undefined)
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    found = []
    for r in range(rows):
        one = build.load(build.gep(starts[r], [column]), align=4)
        first = build.insert_element(nothing, one, ir.Constant(ir.IntType(32), 0))
        factor = build.shuffle_vector(first, nothing, lanes)
        found.append([build.call(fma, [factor, values[j], sums[r][j]]) for j in range(vectors)])
    following = build.add(p, number(1))
    p.add_incoming(following, loop)
    for r in range(rows):
        for j in range(vectors):
            sums[r][j].add_incoming(ir.Constant(_vector, None), before)
            sums[r][j].add_incoming(found[r][j], loop)
    build.cbranch(build.icmp_signed("<", following, k), loop, after)
    build.position_at_end(after)
    for r in range(rows):
        for j in range(vectors):
            place = build.add(build.mul(ldc, number(r)), number(LANES * j))
            pointer = build.bitcast(build.gep(at_c, [place]), _vector.as_pointer())
            build.store(found[r][j], pointer, align=4)


@intrinsic
def _square(context, source, wide, target, tall):
    """Transposes lanes x lanes numbers in registers."""

    def generate(context, builder, signature, args):
        _emit_square(builder, *args)
        return context.get_dummy_value()

    n = types.int64
    return types.void(n, n, n, n), generate


def _emit_square(build: Any, source: Any, wide: Any, target: Any, tall: Any) -> None:
    start, end = (build.inttoptr(p, _float.as_pointer()) for p in (source, target))
    number = lambda value: ir.Constant(_long, value)
    rows = [_vector_at(build, start, build.mul(wide, number(r))) for r in range(LANES)]
    index = ir.VectorType(ir.IntType(32), LANES)
    halves = [
        ir.Constant(index, [lane // 2 + first + LANES * (lane % 2) for lane in range(LANES)])
        for first in (0, LANES // 2)
    ]
    for _ in range(LANES.bit_length() - 1):  # so many perfect shuffles of the rows are a transposition
        pairs = [(rows[r], rows[r + LANES // 2]) for r in range(LANES // 2)]
        rows = [build.shuffle_vector(*pair, half) for pair in pairs for half in halves]
    for r, row in enumerate(rows):
        pointer = build.gep(end, [build.mul(tall, number(r))])
        build.store(row, build.bitcast(pointer, _vector.as_pointer()), align=4)


def _vector_at(build: Any, start: Any, place: Any) -> Any:
    return build.load(build.bitcast(build.gep(start, [place]), _vector.as_pointer()), align=4)


_six_four, _three_four, _one_four = _tile(6, 4), _tile(3, 4), _tile(1, 4)
_six_two, _three_two, _one_two = _tile(6, 2), _tile(3, 2), _tile(1, 2)
_six_one, _three_one, _one_one = _tile(6, 1), _tile(3, 1), _tile(1, 1)


@intrinsic
def floats(context, address):
    """An address as a pointer to float32."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], _float.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def longs(context, address):
    """An address as a pointer to int64."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], _long.as_pointer())

    return types.CPointer(types.int64)(types.int64), generate


@intrinsic
def doubles(context, address):
    """An address as a pointer to float64."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.DoubleType().as_pointer())

    return types.CPointer(types.float64)(types.int64), generate


@intrinsic
def drawn(context, plan, place):
    """The number at a place of the plan, which is then one more: no two threads get the same."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), ir.Constant(_long, 1), "seq_cst")

    return types.int64(types.CPointer(types.int64), types.int64), generate


@plain
def multiply(a, lda, ak, b, ldb, c, ldc, m, k, vectors):
    """``c[m, n] = a[m, k] b[k, n]``: addresses, elements from row to row (``ak``: from column to column)."""
    v = 0
    while v < vectors:
        wide = 4 if vectors - v >= 4 else 2 if vectors - v >= 2 else 1
        to_b, to_c, r = b + 4 * LANES * v, c + 4 * LANES * v, 0
        while r < m:
            from_a, into = a + 4 * r * lda, to_c + 4 * r * ldc
            high = 6 if m - r >= 6 else 3 if m - r >= 3 else 1
            if wide == 4:
                if high == 6:
                    _six_four(from_a, lda, ak, to_b, ldb, into, ldc, k)
                elif high == 3:
                    _three_four(from_a, lda, ak, to_b, ldb, into, ldc, k)
                else:
                    _one_four(from_a, lda, ak, to_b, ldb, into, ldc, k)
            elif wide == 2:
                if high == 6:
                    _six_two(from_a, lda, ak, to_b, ldb, into, ldc, k)
                elif high == 3:
                    _three_two(from_a, lda, ak, to_b, ldb, into, ldc, k)
                else:
                    _one_two(from_a, lda, ak, to_b, ldb, into, ldc, k)
            elif high == 6:
                _six_one(from_a, lda, ak, to_b, ldb, into, ldc, k)
            elif high == 3:
                _three_one(from_a, lda, ak, to_b, ldb, into, ldc, k)
            else:
                _one_one(from_a, lda, ak, to_b, ldb, into, ldc, k)
            r += high
        v += wide


@plain
def transpose(source, target, rows, columns, wide, tall):
    """``target[c, r] = source[r, c]``: addresses, numbers from row to row; both hold whole vectors."""
    for r in range(0, rows, LANES):
        for c in range(0, columns, LANES):
            _square(source + 4 * (r * wide + c), wide, target + 4 * (c * tall + r), tall)
