"""Runs the few PTX instructions of the kernels' unpacking on the CPU, for many words at once."""

import re

import numpy as np
import torch

_FLOATS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def run(asm: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Registers $0 .. of ``asm``, with ``inputs`` (uint32 arrays of one length) in the registers behind them.

    Registers that nothing has written raise a KeyError.
    """
    registers = {f"${outputs + i}": value.astype(np.uint32) for i, value in enumerate(inputs)}
    for line in asm.strip().strip("{}").split(";"):
        operation, _, operands = line.strip().partition(" ")
        if operation in ("", ".reg"):
            continue
        target, *names = (name.strip() for name in operands.split(","))
        values = [_value(name, registers) for name in names]
        registers[target] = np.broadcast_to(_apply(operation, *values), inputs[0].shape).astype(np.uint32)
    return [registers[f"${i}"] for i in range(outputs)]


def _value(name: str, registers: dict):
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", name):
        return np.uint32(int(name, 0) & 0xFFFFFFFF)
    return registers[name]


def _apply(operation: str, a, b=None, c=None, d=None):
    if operation == "mov.b32":
        return a
    if operation == "and.b32":
        return a & b
    if operation == "xor.b32":
        return a ^ b
    if operation == "shl.b32":
        return (a.astype(np.uint64) << np.uint64(b)) & np.uint64(0xFFFFFFFF)
    if operation == "shr.u32":
        return a >> b
    if operation in ("mul.lo.u32", "mad.lo.u32"):
        product = np.asarray(a, np.uint64) * np.asarray(b, np.uint64)
        return (product if c is None else product + c) % 2**32
    if operation == "lop3.b32":
        return _lop3(a, b, c, int(d))
    if operation == "prmt.b32":
        return _prmt(a, b, c)
    if operation.startswith("fma.rn."):
        return _fma(a, b, c, _FLOATS[operation.removeprefix("fma.rn.")])
    raise NotImplementedError(operation)


def _lop3(a, b, c, table: int):
    """Bit 4 i + 2 j + k of the table is the result for bits i, j, k."""
    found = np.uint32(0)
    for i in range(8):
        if table >> i & 1:
            terms = [v if i >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0))]
            found = found | (terms[0] & terms[1] & terms[2])
    return found


def _prmt(a, b, selector):
    """Byte i of the result is byte number ``selector >> 4 i`` of b:a; the sign mode is not used."""
    found = np.uint32(0)
    for i in range(4):
        number = int(selector) >> 4 * i & 0xF
        assert number < 8
        found = found | ((a if number < 4 else b) >> np.uint32(number % 4 * 8) & np.uint32(0xFF)) << np.uint32(8 * i)
    return found


def pair(word: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """(n,) words -> (n, 2) numbers of a 16-bit float, low half first."""
    return torch.from_numpy(np.array(word, np.uint32).view(np.int16).reshape(-1, 2)).view(dtype)


def words(numbers: torch.Tensor) -> np.ndarray:
    """The inverse of :func:`pair`."""
    return numbers.contiguous().view(torch.int16).numpy().view(np.uint32).reshape(-1)


def _fma(a, b, c, dtype):
    shape = np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c))
    a, b, c = (pair(np.broadcast_to(v, shape), dtype).double() for v in (a, b, c))
    return words((a * b + c).to(dtype))  # float64 holds it exactly for what is asked here
