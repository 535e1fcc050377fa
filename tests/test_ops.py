"""The ops: torch's own contract checks, and the references against an independent numpy implementation."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from random_components import packed

from tqcompile import ops
from tqcompile.ops.packing import dequantize_int4, integer_scales, pack_int4, unpack_int4
from tqcompile.ops.twin_gemm import from_planes, to_planes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SHAPES = ((5, 64), (2, 3, 64), (0, 64), (64,))


def integers(packed_values: torch.Tensor) -> np.ndarray:
    """Unpack without any of the code under test."""
    nibbles = np.stack([packed_values.numpy() & 15, packed_values.numpy() >> 4], -1).reshape(len(packed_values), -1)
    return np.where(nibbles > 7, nibbles.astype(int) - 16, nibbles.astype(int)).astype(np.float64)


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def dense(values: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    q = integers(values)
    return q * np.repeat(wide(scale), q.shape[1] // scale.shape[1], axis=1)


def twin_arguments(shape, dtype, integer, ratio, rank, bias, n=20, groups=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = shape[-1]
    x, x_scale = torch.randn(shape, generator=g).to(dtype), None
    if integer:
        x, x_scale = ops.quantize_activation_reference(x)
    residual = packed(n, k, groups, g)
    down, up = (packed(rank, k, groups, g), packed(n, rank, 1, g)) if rank else ((None, None), (None, None))
    b = torch.randn(n, generator=g).to(dtype) if bias else None
    return (x, x_scale, *residual, *down, *up, b, ratio, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_activation_keeps_the_contract_of_torch_library(shape, dtype):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g).to(dtype)
    scale, rotation = torch.rand(64, generator=g) + 0.5, torch.randn(16, 16, generator=g).bfloat16()
    for args in ((x,), (x, scale), (x, None, rotation), (x, scale, rotation)):
        torch.library.opcheck(ops.quantize_activation, args)


@pytest.mark.parametrize(
    ("integer", "ratio", "rank", "bias"),
    [
        (integer, ratio, rank, bias)
        for integer in (False, True)
        for ratio in ((0.0, 0.061) if integer else (0.0,))
        for rank in (0, 6)
        for bias in (False, True)
    ],
)
def test_twin_linear_keeps_the_contract_of_torch_library(integer, ratio, rank, bias):
    # The full product would take minutes; each form meets each shape, and each dtype.
    for i, shape in enumerate(SHAPES):
        args = twin_arguments(shape, DTYPES[i % 3], integer, ratio, rank, bias)
        torch.library.opcheck(ops.twin_linear, args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_activation_is_the_formula(dtype):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(7, 96, generator=g).to(dtype)
    x[3] = 0
    scale, rotation = torch.rand(96, generator=g) + 0.5, torch.randn(32, 32, generator=g).bfloat16()
    h = wide((x.float() * scale).to(dtype)).reshape(7, 3, 32) @ wide(rotation.to(dtype))
    h = h.reshape(7, 96)
    q, x_scale = ops.quantize_activation(x, scale, rotation)
    assert q.dtype == torch.int8
    assert x_scale.shape == (7, 1)
    assert x_scale.dtype == torch.float32
    expected = np.maximum(np.abs(h).max(-1, keepdims=True), 1e-30) / 127
    np.testing.assert_allclose(wide(x_scale), expected, rtol=1e-5)
    # Half a step of rounding, and what float32 sums of 32 products may move a value across a boundary.
    assert np.abs(wide(q) * wide(x_scale) - h).max() <= 0.5001 * expected.max()
    assert not q[3].any()
    assert q.abs().amax(-1)[:3].eq(127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 10])
@pytest.mark.parametrize(("integer", "ratio"), [(False, 0.0), (True, 0.0), (True, 7 / 114.3)])
def test_twin_linear_is_the_formula(dtype, rank, integer, ratio):
    args = twin_arguments((3, 5, 96), dtype, integer, ratio, rank, True, n=33, groups=3, seed=3)
    x, x_scale, residual, residual_scale, down, down_scale, up, up_scale, bias, _, _ = args
    values, scale = wide(x), wide(x_scale) if integer else 1.0
    # x * ratio is rounded in float32, so that the integers are the same ones.
    operand = np.clip(np.rint((x.float() * ratio).numpy()), -8, 7) / ratio if ratio else values
    terms = [operand @ dense(residual, residual_scale).T * scale, wide(bias)]
    size = np.abs(operand) @ np.abs(dense(residual, residual_scale)).T * scale + np.abs(wide(bias))
    if rank:
        t = values @ dense(down, down_scale).T * scale
        terms.append(t @ dense(up, up_scale).T)
        size = size + np.abs(t) @ np.abs(dense(up, up_scale)).T
    got = ops.twin_linear(*args)
    assert got.dtype == dtype
    assert got.shape == (3, 5, 33)
    # One rounding of the result and one of t, each half an ulp; float32 sums of 96 terms.
    assert (np.abs(wide(got) - sum(terms)) <= size * (EPS[dtype] + 100 * EPS[torch.float32])).all()


@given(st.integers(1, 5), st.integers(1, 9), st.randoms(use_true_random=False))
def test_packing_round_trip(rows, pairs, random):
    values = torch.tensor([[random.randint(-8, 7) for _ in range(2 * pairs)] for _ in range(rows)])
    stored = pack_int4(values)
    assert stored.shape == (rows, pairs)
    assert stored.dtype == torch.uint8
    assert torch.equal(unpack_int4(stored).long(), values)
    assert np.array_equal(integers(stored), values.numpy())
    scale = torch.rand(rows, pairs)
    expected = values * scale.repeat_interleave(2, -1)
    assert torch.equal(dequantize_int4(stored, scale), expected)


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="must be even"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))
    for value in (-9, 8):
        with pytest.raises(ValueError, match=r"\[-8, 7\]"):
            pack_int4(torch.tensor([[0, value]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(1, None), "int8 x comes with x_scale"),
        (lambda a: a.__setitem__(6, None), "down and up come together"),
        (lambda a: a.__setitem__(2, a[2][:, :-1]), "residual must be"),
        (lambda a: a.__setitem__(8, a[8][:-1]), "bias must be"),
    ],
)
def test_wrong_arguments_are_refused_while_tracing(change, message):
    args = list(twin_arguments((4, 64), torch.float32, True, 0.0, 6, True))
    change(args)
    with pytest.raises(RuntimeError, match=message):
        ops.twin_linear(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in args])


def grid(units, multiples):
    """(N,) numbers of four significant bits times (N, G) integers in [1, 16], as bfloat16."""
    exact = np.array(units)[:, None] * np.array(multiples, dtype=np.float64)
    scale = torch.tensor(exact).bfloat16()
    assert np.array_equal(wide(scale), exact)
    return scale


def assert_exact(scale):
    c, m = integer_scales(scale)
    assert (c.dtype, m.dtype, m.shape) == (torch.float32, torch.uint8, scale.shape)
    assert m.min() >= 1
    assert m.max() <= 16
    assert np.array_equal(wide(c)[:, None] * wide(m), wide(scale))


@given(
    st.lists(
        st.tuples(st.integers(8, 15), st.integers(-110, 100), st.lists(st.integers(1, 16), min_size=5, max_size=5)),
        min_size=1,
        max_size=4,
    )
)
@example([(15, -110, [16, 15, 13, 11, 1]), (8, 100, [16, 16, 16, 16, 16])])
@example([(11, 0, [2, 4, 6, 16, 12])])
def test_scales_on_a_grid_are_recovered_exactly(rows):
    scale = grid([float(a) * 2.0**e for a, e, _ in rows], [m for *_, m in rows])
    assert_exact(scale)
    assert_exact(scale.float())
    assert_exact(scale[:, :1])


@given(st.lists(st.integers(128, 255), min_size=3, max_size=3), st.lists(st.integers(-3, 3), min_size=3, max_size=3))
def test_integer_scales_find_a_form_exactly_when_there_is_one(mantissas, exponents):
    integers_ = [a * 2 ** (e + 3) for a, e in zip(mantissas, exponents, strict=True)]
    scale = torch.tensor([[float(i) for i in integers_]]).bfloat16()
    divisor = np.gcd.reduce(integers_)
    if max(integers_) // divisor <= 16:
        assert_exact(scale)
    else:
        assert integer_scales(scale) is None


@pytest.mark.parametrize(
    "row",
    [
        [1.0, 17.0],  # too far apart
        [1.0, 1.0078125],  # neighbours in bfloat16: 128 and 129 units
        [16.0, 15.0, 1.5],  # unit 0.5 would need the multiple 32
        [0.0, 1.0],
        [-1.0, -1.0],
        [float("inf"), float("inf")],
        [float("nan"), 1.0],
        [2.0**-126, 2.0**-126 * 1.5],  # the unit is no normal float32
    ],
)
def test_one_row_without_integer_scales_is_enough_for_none(row):
    good = [4.0] * len(row)
    assert integer_scales(torch.tensor([good, good]).bfloat16()) is not None
    assert integer_scales(torch.tensor([good, row, good]).bfloat16()) is None


def int8_arguments(shape, dtype, n, groups, bias, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = shape[-1]
    weight = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
    scale = (torch.rand(n, groups, generator=g) * 0.02 + 0.001).bfloat16()
    b = torch.randn(n, generator=g).to(dtype) if bias else None
    return torch.randn(shape, generator=g).to(dtype), weight, scale, b


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_int8_linear_matches_an_independent_computation(shape, dtype, bias):
    args = int8_arguments(shape, dtype, 20, 2, bias)
    torch.library.opcheck(ops.int8_linear, args)
    x, weight, scale, b = args
    w = wide(weight) * np.repeat(wide(scale), 64 // 2, axis=1)
    exact = wide(x) @ w.T + (wide(b) if bias else 0)
    bound = EPS[dtype] * np.abs(exact) + 1e-5 * (np.abs(wide(x)) @ np.abs(w).T + 1)
    assert (np.abs(wide(ops.int8_linear(*args)) - exact) <= bound).all()


def test_int8_linear_refuses_what_does_not_fit():
    x, weight, scale, _ = int8_arguments((3, 64), torch.float32, 20, 2, False)
    for wrong in (
        (x.int(), weight, scale, None),
        (x, weight.short(), scale, None),
        (x[:, :32], weight, scale, None),
        (x, weight, scale[:7], None),
        (x, weight, scale[:, :1].expand(20, 3), None),
        (x, weight, scale, torch.zeros(3)),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.tqcompile.int8_linear(*(a.to("meta") if a is not None else None for a in wrong))


def natural(planes):
    """Even channels first, then odd ones -> channels in their own order."""
    values = np.empty_like(planes)
    values[..., 0::2], values[..., 1::2] = np.split(planes, 2, -1)
    return values


def gemm_arguments(shape, dtype, integer, rank, bias, addend, n=20, groups=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = shape[-1]
    operand, scale = torch.randn(shape, generator=g).to(dtype), None
    if integer:
        operand, scale = ops.quantize_activation_reference(operand)
        operand = to_planes(operand)
    t = torch.randn(*shape[:-1], rank, generator=g).to(dtype) if rank else None
    up = packed(n, rank, 1, g) if rank else (None, None)
    channel = torch.rand(n, generator=g) + 0.5
    residual, residual_scale = packed(n, k, groups, g)
    residual_scale = channel[:, None] * torch.randint(1, 17, residual_scale.shape, generator=g)
    b = torch.randn(n, generator=g).to(dtype) if bias else None
    a = torch.randn(*shape[:-1], n, generator=g).to(dtype) if addend else None
    return (operand, scale, t, residual, residual_scale, channel if integer else None, *up, b, a, dtype)


@pytest.mark.parametrize(
    ("integer", "rank", "bias", "addend"), [(True, 6, True, True), (False, 6, False, True), (True, 0, True, False)]
)
def test_twin_gemm_keeps_the_contract_of_torch_library(integer, rank, bias, addend):
    for i, shape in enumerate(SHAPES):
        torch.library.opcheck(ops.twin_gemm, gemm_arguments(shape, DTYPES[i % 3], integer, rank, bias, addend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 10])
@pytest.mark.parametrize("integer", [False, True])
def test_twin_gemm_is_the_formula(dtype, rank, integer):
    args = gemm_arguments((3, 5, 96), dtype, integer, rank, True, True, n=33, groups=3, seed=4)
    operand, scale, t, residual, residual_scale, _, up, up_scale, bias, addend, _ = args
    values = natural(wide(operand))
    if integer:
        values = values * wide(scale)
    w = dense(residual, residual_scale)
    y, size = values @ w.T + wide(bias) + wide(addend), np.abs(values) @ np.abs(w).T
    size = size + np.abs(wide(bias)) + np.abs(wide(addend))
    if rank:
        y = y + natural(wide(t)) @ dense(up, up_scale).T
        size = size + np.abs(natural(wide(t))) @ np.abs(dense(up, up_scale)).T
    got = ops.twin_gemm(*args)
    assert (got.dtype, got.shape) == (dtype, (3, 5, 33))
    # One rounding of the result, half an ulp; float32 sums of 96 terms.
    assert (np.abs(wide(got) - y) <= np.abs(y) * EPS[dtype] / 2 + size * 100 * EPS[torch.float32]).all()


@pytest.mark.parametrize("integer", [False, True])
def test_twin_gemm_makes_a_t_that_was_left_to_it(integer):
    args = list(gemm_arguments((3, 5, 96), torch.float32, integer, 10, False, False, n=33, groups=3, seed=5))
    operand, scale, t, residual, residual_scale, _, up, up_scale, *_ = args
    down, down_scale = packed(10, 96, 3, torch.Generator().manual_seed(6))
    values = natural(wide(operand)) * (wide(scale) if integer else 1)
    low = values @ dense(down, down_scale).T
    y = values @ dense(residual, residual_scale).T + low @ dense(up, up_scale).T
    size = np.abs(values) @ np.abs(dense(residual, residual_scale)).T
    size = size + np.abs(values) @ np.abs(dense(down, down_scale)).T @ np.abs(dense(up, up_scale)).T
    bound = size * 300 * EPS[torch.float32]
    args[2] = torch.full_like(t, float("nan"))  # as prologue leaves it
    got = ops.twin_gemm(*args, down, down_scale, 15)
    assert (np.abs(wide(got) - y) <= bound).all()
    args[2] = t  # one token fewer than it takes: t counts, down does not
    y = values @ dense(residual, residual_scale).T + natural(wide(t)) @ dense(up, up_scale).T
    size = size + np.abs(natural(wide(t))) @ np.abs(dense(up, up_scale)).T
    assert (np.abs(wide(ops.twin_gemm(*args, down, down_scale, 16)) - y) <= size * 300 * EPS[torch.float32]).all()
    torch.library.opcheck(ops.twin_gemm, (*args, down, down_scale, 15))


def test_planes_are_the_even_and_then_the_odd_channels():
    x = torch.arange(12).reshape(2, 6)
    assert to_planes(x).tolist() == [[0, 2, 4, 1, 3, 5], [6, 8, 10, 7, 9, 11]]
    assert torch.equal(from_planes(to_planes(x)), x)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, None, "int8 operand comes with operand_scale"),
        (2, None, "t, up and up_scale come together"),
        (3, torch.zeros(20, 31, dtype=torch.uint8), "residual must be"),
        (4, torch.ones(20, 5), "groups must divide K"),
        (5, torch.ones(19), "channel_scale must be"),
        (6, torch.zeros(20, 4, dtype=torch.uint8), "up must be"),
        (8, torch.ones(19), "bias must be"),
        (9, torch.ones(4, 19), "addend must be"),
    ],
)
def test_wrong_arguments_of_twin_gemm_are_refused_while_tracing(position, value, message):
    args = list(gemm_arguments((4, 64), torch.float32, True, 6, True, True))
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        ops.twin_gemm(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in args])
