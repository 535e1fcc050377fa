"""The Triton kernels on the CPU, in Triton's interpreter, against float64 with a derived bound."""

import inspect

import pytest
import torch
from kernel_bounds import (
    INT8_CASES,
    QUANTIZE_CASES,
    TWIN_CASES,
    random_int8_args,
    random_twin_args,
    twin_linear_exact,
    unpacked,
    worst_int8_linear,
    worst_quantize_activation,
    worst_twin_linear,
)

pytest.importorskip("triton")
from tqcompile.kernels import int8_linear as int8_kernel
from tqcompile.kernels import quantize_activation as quantize_kernel
from tqcompile.kernels import twin_linear as twin_kernel
from tqcompile.ops.int8_linear import int8_linear_reference
from tqcompile.ops.packing import dequantize_int4
from tqcompile.ops.quantize_activation import quantize_activation_reference
from tqcompile.ops.twin_linear import twin_linear_reference

pytestmark = [
    pytest.mark.skipif(not twin_kernel.INTERPRET, reason="a GPU is used: see tests/gpu"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fresh memory reads as NaN, or the largest integer: a value the kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run_twin(args, **options):
    assert twin_kernel.unsupported(*args) is None
    return twin_kernel.launch(*args, **options)


@pytest.mark.parametrize(("t", "n", "k", "rank", "form", "dtype", "options"), TWIN_CASES)
def test_twin_linear_is_within_its_bound(t, n, k, rank, form, dtype, options):
    args = random_twin_args(t, n, k, rank, form, dtype, seed=0, **options)
    assert worst_twin_linear(run_twin(args), args) <= 1
    assert worst_twin_linear(twin_linear_reference(*args), args) <= 1


@pytest.mark.parametrize("form", ["w4a8", "w4a4", "w4a16"])
@pytest.mark.parametrize("splits", [2, 5])
def test_splits_of_k_meet_and_leave_the_counters_clean(form, splits):
    args = random_twin_args(9, 100, 640, 24, form, BF16, seed=1)
    tile = twin_kernel.Tile(64, 8, 128, splits, 4, 2)
    first = run_twin(args, tile=tile)
    assert worst_twin_linear(first, args) <= 1
    assert torch.equal(run_twin(args, tile=tile), first)


def test_the_bound_is_tight_enough_to_see_one_wrong_weight():
    args = random_twin_args(4, 64, 128, 16, "w4a8", BF16, seed=2)
    y = run_twin(args)
    for i in (2, 4, 6):  # residual, down, up
        wrong = list(args)
        wrong[i] = args[i].clone()
        wrong[i][:, 0] ^= 0x88
        assert worst_twin_linear(y, tuple(wrong)) > 1


def test_int8_w4a8_equals_the_reference_to_float32_rounding():
    args = random_twin_args(5, 70, 384, 16, "w4a8", FP32, seed=3)
    torch.testing.assert_close(run_twin(args), twin_linear_reference(*args), rtol=1e-5, atol=1e-5)


def test_four_bit_rounding_is_half_to_even():
    x = torch.arange(-127, 128, dtype=torch.int8).reshape(1, -1)
    x = torch.nn.functional.pad(x, (0, 1))
    packed = torch.full((256, 128), 0, dtype=torch.uint8)
    for i in range(256):  # row i picks element i
        packed[i, i // 2] = 1 << (4 * (i % 2))
    args = (x, torch.ones(1, 1), packed, torch.ones(256, 2), None, None, None, None, None, 0.5, FP32)
    expected = torch.round(x.float() * 0.5).clamp(-8, 7) / 0.5
    assert torch.equal(run_twin(args), expected)


def test_x_may_be_strided_and_t_may_be_zero():
    args = random_twin_args((2, 6), 40, 128, 8, "w4a8", BF16, seed=4)
    strided = (args[0][:, ::2], args[1][:, ::2], *args[2:])
    assert not strided[0].is_contiguous()
    assert worst_twin_linear(run_twin(strided), strided) <= 1
    empty = random_twin_args((2, 0), 40, 128, 8, "w4a16", BF16)
    assert run_twin(empty).shape == (2, 0, 40)


def test_refusals_name_the_reason():
    good = random_twin_args(2, 32, 128, 8, "w4a8", BF16, seed=5)

    def refused(**changes):
        names = inspect.signature(twin_kernel.unsupported).parameters
        args = dict(zip(names, good, strict=True)) | changes
        return twin_kernel.unsupported(*args.values())

    assert refused() is None
    assert "group" in refused(residual_scale=torch.ones(32, 8))  # groups of 16
    assert "groups" in refused(residual_scale=torch.ones(32, 3))
    assert "rank" in refused(down=torch.zeros(130, 64, dtype=torch.uint8))
    assert "contiguous" in refused(up=good[6].t().contiguous().t())
    assert "come together" in refused(up=None)
    assert "output dtype" in refused(dtype=torch.float64)
    assert "x_scale" in refused(x_scale=None)
    assert "x_scale" in refused(x_scale=torch.ones(3, 1))
    assert "x must" in refused(x=torch.zeros(2, 128, dtype=torch.int16))
    assert "uint8" in refused(residual=torch.zeros(32, 64, dtype=torch.int8))
    assert "matrices" in refused(residual=torch.zeros(32, dtype=torch.uint8))
    assert "device" in refused(bias=torch.zeros(32, device="meta"))
    assert "GPU" in twin_kernel.unsupported(*(a.to("meta") if torch.is_tensor(a) else a for a in good))


def test_the_helper_unpacks_as_the_project_packs():
    packed = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    scale = torch.rand(2, 4)
    torch.testing.assert_close(unpacked(packed, scale).float(), dequantize_int4(packed, scale))
    args = random_twin_args(2, 40, 128, 8, "w4a8", FP32, seed=6)
    exact = twin_linear_exact(*args)[0]
    assert torch.equal(exact, twin_linear_exact(*args, rows=16)[0])


@pytest.mark.parametrize(("t", "k", "block", "scaled", "dtype"), QUANTIZE_CASES)
def test_quantize_activation_is_within_its_bound(t, k, block, scaled, dtype):
    g = torch.Generator().manual_seed(7)
    lead = t if isinstance(t, tuple) else (t,)
    x = (torch.randn(*lead, k, generator=g) * 3).to(dtype)
    scale = torch.rand(k, generator=g) + 0.5 if scaled else None
    turn = torch.linalg.qr(torch.randn(block, block, generator=g))[0] if block else None
    assert quantize_kernel.unsupported(x, scale, turn) is None
    x_q, x_scale = quantize_kernel.launch(x, scale, turn)
    assert worst_quantize_activation(x_q, x_scale, x, scale, turn) <= 1
    q, s = quantize_activation_reference(x, scale, turn)
    assert worst_quantize_activation(q, s, x, scale, turn) <= 1
    # A sum in another order may move a value across a rounding boundary, by one step.
    assert (x_q.int() - q.int()).abs().max() <= (1 if block else 0)


def test_quantize_activation_rounds_half_to_even_and_takes_zeros_and_strides():
    x = torch.zeros(2, 128)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, -2.5, -0.5, -127.0])
    x_q, x_scale = quantize_kernel.launch(x, None, None)
    assert x_q[0, :6].tolist() == [127, 0, 2, -2, 0, -127]
    assert x_scale[0].item() == 1
    assert not x_q[1].any()
    assert x_scale[1].item() > 0
    wide = torch.randn(128, 6).t()
    x_q, x_scale = quantize_kernel.launch(wide, None, None)
    assert worst_quantize_activation(x_q, x_scale, wide, None, None) <= 1
    x_q, x_scale = quantize_kernel.launch(torch.zeros(0, 128), None, None)
    assert (x_q.shape, x_scale.shape) == ((0, 128), (0, 1))


def test_quantize_activation_refusals_name_the_reason():
    x = torch.zeros(2, 128)
    assert quantize_kernel.unsupported(x, None, None) is None
    assert "x must" in quantize_kernel.unsupported(x.int(), None, None)
    assert "input_scale" in quantize_kernel.unsupported(x, torch.ones(64), None)
    assert "rotation" in quantize_kernel.unsupported(x, None, torch.eye(8))
    assert "rotation" in quantize_kernel.unsupported(x[:, :96], None, torch.eye(64))


def test_a_tile_fits_every_shape():
    for t in (1, 8, 9, 16, 17, 64, 65, 256, 257, 8192):
        for n in (1, 128, 4096, 28672):
            for k, group in ((64, 32), (96, 96), (4096, 128), (14336, 128)):
                for int8 in (True, False):
                    tile = twin_kernel.choose_tile(t, n, k, 64, group, int8, False, 132)
                    assert group % tile.step == 0
                    assert 1 <= tile.splits <= max(1, k // tile.step // 2)


@pytest.mark.parametrize("case", INT8_CASES)
def test_int8_linear_is_within_its_bound(case):
    args = random_int8_args(*case, seed=0)
    assert int8_kernel.unsupported(*args) is None
    assert worst_int8_linear(int8_kernel.launch(*args), *args) <= 1
    assert worst_int8_linear(int8_linear_reference(*args), *args) <= 1


@pytest.mark.parametrize("tile", [(16, 16, 32, 4, 2), (64, 32, 64, 4, 2), (128, 128, 128, 8, 2)])
def test_every_tile_of_int8_linear_is_right(tile):
    args = random_int8_args(37, 150, 256, 2, BF16, True, seed=1)
    assert worst_int8_linear(int8_kernel.launch(*args, tile=int8_kernel.Tile(*tile)), *args) <= 1


def test_the_bound_of_int8_linear_sees_one_lost_product():
    args = random_int8_args(5, 40, 256, 2, BF16, True, seed=2)
    x = args[0].clone()
    x[2, 100] = 0
    assert worst_int8_linear(int8_kernel.launch(x, *args[1:]), *args) > 1


def test_int8_linear_says_what_it_does_not_support():
    x, weight, scale, _ = random_int8_args(3, 40, 96, 3, BF16, False)
    assert int8_kernel.unsupported(x, weight, scale, None) is None
    assert "multiple of 32" in int8_kernel.unsupported(x, weight, scale[:, :1].repeat(1, 6), None)
    assert "not float32" in int8_kernel.unsupported(x.double(), weight, scale, None)
    assert "int8" in int8_kernel.unsupported(x, weight.short(), scale, None)
