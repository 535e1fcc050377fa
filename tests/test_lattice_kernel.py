"""The Triton kernel of ``lattice_linear`` on the CPU, in Triton's interpreter, against float64 with a derived bound."""

import itertools

import pytest
import torch
from lattice_bounds import CASES, random_arguments, worst

pytest.importorskip("triton")
from tqcompile.kernels import lattice_linear as kernel
from tqcompile.kernels import twin_gemm
from tqcompile.ops.lattice_linear import lattice_linear_reference

pytestmark = [
    pytest.mark.skipif(not kernel.INTERPRET, reason="a GPU is used: see tests/gpu"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fresh memory reads as NaN: a value the kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_within_its_bound(case):
    args = random_arguments(*case)
    assert kernel.unsupported(*args) is None
    form = "dense" if case[0] > kernel.DENSE_TOKENS else "exact"
    assert worst(kernel.launch(*args), *args, form=form) <= 1
    assert kernel.describe(*args) == ("dense" if case[0] > kernel.DENSE_TOKENS else "fused")
    assert worst(lattice_linear_reference(*args), *args) <= 1


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("tile", [(64, 16, 64, 1, 4, 2), (32, 32, 128, 3, 4, 2), (128, 16, 32 * 2, 5, 4, 2)])
def test_every_tile_and_split_is_right_and_repeats(bits, tile):
    args = random_arguments(21, 75, 640, 5, bits, BF16, "zero", True, seed=1)
    first = kernel.launch(*args, tile=kernel.Tile(*tile))
    assert worst(first, *args) <= 1
    assert torch.equal(kernel.launch(*args, tile=kernel.Tile(*tile)), first)


def test_the_bound_sees_one_wrong_code():
    args = random_arguments(3, 40, 256, 2, 2, BF16, "zero", True, seed=2)
    wrong = list(args)
    wrong[1] = args[1].clone()
    wrong[1][7, 3] ^= 2
    assert worst(kernel.launch(*args), *wrong) > 1


def test_x_may_be_strided_and_have_no_tokens():
    x, *rest = random_arguments(6, 40, 128, 1, 2, BF16, "offset", True, seed=3)
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(kernel.launch(strided, *rest), kernel.launch(x, *rest))
    assert kernel.launch(x[:0], *rest).shape == (0, 40)
    assert torch.equal(kernel.launch(x.view(2, 3, 128), *rest), kernel.launch(x, *rest).view(2, 3, 40))


@pytest.mark.parametrize("t", [1, 5, 17, 64, 128])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(28672, 4096, 128), (4096, 14336, 14336), (40, 192, 192), (614, 4096, 64)]
)
def test_a_tile_fits_every_shape(t, n, k, group):
    for wide in (False, True):
        tile = kernel.choose_tile(t, n, k, group, wide)
        assert group % tile.step == 0
        assert tile.step % 64 == 0
        assert 1 <= tile.splits <= k // tile.step


@pytest.mark.parametrize(
    ("n", "k"), [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (40, 128), (57344, 8192), (8, 384)]
)
def test_the_forms_for_hopper_have_room_for_what_the_rules_choose(n, k):
    for t, bits, zero in itertools.product((1, 3, 7, 9, 16), (2, 3), (True, False)):
        cut = kernel.choose_skinny(t, n, k, bits, zero)
        assert cut.row_warps * cut.k_warps in (4, 8, 16)
        vector, own = kernel.warp_share(k // 128, cut.k_warps, cut.unroll, True)
        assert own * cut.k_warps >= k // 128
        assert own % vector == cut.unroll % vector == k // 128 % vector == 0
        assert cut.registers is None or cut.registers * 32 * cut.row_warps * cut.k_warps <= 65536
    for t in (17, 33, 64, 100, 200, 512, 1024):
        cut = kernel.choose_wgmma(t, n, k)
        assert cut.tokens in (32, 64, 128, 256)
        assert 1 <= cut.splits <= max(1, k // kernel.UNIT)
        assert kernel.stages(cut.tokens, cut.programs) >= 2


def test_refusals_name_the_reason():
    x, codes, scale, zero, _, _, bits = random_arguments(3, 40, 192, 3, 2, BF16, "zero", False)
    assert kernel.unsupported(x, codes, scale, zero, None, None, bits) is None
    for wrong, reason in (
        ((x.double(), codes, scale, zero, None, None, bits), "not float32"),
        ((x, codes, scale, zero, None, None, 3), "multiple of 64"),
        ((x, codes.to(torch.int8), scale, zero, None, None, bits), "uint8"),
        ((x, codes, scale[:, :1].repeat(1, 6), zero, None, None, bits), "multiple of 64"),
        ((x, codes.t().contiguous().t(), scale, zero, None, None, bits), "contiguous"),
        ((x, codes, scale, zero, torch.zeros(4), None, bits), "exclude"),
        ((x, codes, scale, None, torch.zeros(3), None, bits), "does not divide"),
        ((x, codes, scale.double(), None, None, None, bits), "float32"),
    ):
        assert reason in kernel.unsupported(*wrong)


@pytest.mark.parametrize(
    ("n", "k", "bits", "first"),
    [(28672, 4096, 2, 256), (4096, 14336, 2, 256), (6144, 4096, 2, 64), (28672, 4096, 3, 64), (6144, 4096, 3, 64)],
)
def test_where_bf16_would_not_be_slower_the_report_says_so(n, k, bits, first):
    codes = torch.empty(n, k * bits // 8, dtype=torch.uint8, device="meta")
    scale = torch.empty(n, k // 128, device="meta")
    for t in (1, first - 1, first, 8192):
        found = kernel.remark(torch.empty(t, k, dtype=BF16, device="meta"), codes, scale, None, None, None, bits)
        assert (found is not None) == (t >= first)


@pytest.mark.parametrize("module", [kernel, twin_gemm])
def test_without_gluon_the_report_says_so(module, monkeypatch):
    monkeypatch.setattr(module, "GLUON_REASON", "this Triton's Gluon cannot be imported (no name)")
    x, codes = torch.empty(1, 256, dtype=BF16), torch.empty(8, 64, dtype=torch.uint8)
    scale = torch.empty(8, 2, dtype=BF16)
    arguments = (x, codes, scale, None, None, None, 2) if module is kernel else (x, None, None, codes)
    assert module.remark(*arguments) == module.GLUON_REASON


def test_the_warps_of_the_gemv_form_share_every_unit():
    for units in range(1, 260):
        for warps in (4, 8, 16):
            for unroll in (1, 2, 3, 4, 7):
                for scale_each in (True, False):
                    vector, own, slots = kernel.gemv_share(units, warps, unroll, scale_each)
                    assert 2 * own * warps >= units  # a pair is two units
                    assert slots >= max(2 * own, 4) * warps
                    assert slots & (slots - 1) == 0
                    # Scales loaded together are of one row, one warp and one step.
                    assert vector == 1 or all(n % vector == 0 for n in (units, 2 * own, 2 * unroll))
                    assert vector == 1 or scale_each
