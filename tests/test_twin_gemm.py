"""The kernels of twin_gemm that Triton's interpreter can run, and the rule that chooses among all of them."""

import itertools

import pytest
import torch
from gemm_bounds import random_gemm_args, worst_twin_gemm

pytest.importorskip("triton")
from tqcompile import ops
from tqcompile.kernels import twin_gemm as kernel
from tqcompile.ops.twin_gemm import defer_from_of

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
interpreted = pytest.mark.skipif(not kernel.INTERPRET, reason="needs TRITON_INTERPRET=1: there is a GPU")

# t, n, k, rank, operand, dtype, options; odd T and N, one and several steps and tiles.
CASES = [
    (1, 70, 384, 8, INT8, BF16, {}),
    (3, 130, 128, 16, INT8, FP16, {"bias": False, "addend": True}),
    (17, 70, 384, 48, INT8, FP32, {"grid": False}),
    (40, 131, 256, 128, INT8, BF16, {"group": 64}),
    ((2, 3), 33, 384, None, INT8, BF16, {"group": 384, "addend": True}),
    (3, 70, 384, 16, BF16, BF16, {"grid": False}),
    (17, 130, 128, None, FP16, FP16, {"addend": True}),
    (3, 40, 192, 6, FP32, FP32, {"group": 192}),
    (0, 40, 128, 16, INT8, BF16, {}),
]


def run(args, **options):
    assert kernel.unsupported(*args) is None
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    try:
        return kernel.launch(*args, **options)
    finally:
        torch.use_deterministic_algorithms(False)


@interpreted
@pytest.mark.parametrize(("t", "n", "k", "rank", "operand", "dtype", "options"), CASES)
def test_the_tile_kernel_is_within_its_bound(t, n, k, rank, operand, dtype, options, monkeypatch):
    monkeypatch.delattr(kernel, "run_wgmma")  # as with a Triton without Gluon
    args = random_gemm_args(t, n, k, rank, operand, dtype, **options)
    assert worst_twin_gemm(run(args), *args) <= 1


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_dense_form_is_within_its_bound(dtype):
    args = random_gemm_args(5, 70, 384, 16, dtype, dtype, addend=True)
    y = run(args, config={"kernel": "dense"})
    assert worst_twin_gemm(y, *args, dense=True) <= 1


@interpreted
def test_one_wrong_weight_is_seen():
    args = random_gemm_args(3, 64, 256, 16, INT8, BF16)
    y = run(args)
    for i in (3, 6):  # residual, up
        wrong = list(args)
        wrong[i] = args[i] ^ 0x88
        assert worst_twin_gemm(y, *wrong) > 1


@pytest.mark.parametrize("operand", [INT8, BF16])
def test_the_reference_is_within_the_same_bound(operand):
    args = random_gemm_args(5, 40, 256, 16, operand, BF16, addend=True)
    assert worst_twin_gemm(ops.twin_gemm_reference(*args), *args) <= 1


def problem(t, n, k, r=64, operand=INT8, grid=True, group=128, dtype=BF16, major=9):
    p = kernel._Problem.__new__(kernel._Problem)
    p.t, p.n, p.k, p.r, p.operand, p.grid, p.group, p.dtype, p.major = t, n, k, r, operand, grid, group, dtype, major
    p.one_up_group, p.index, p.sms = True, 0, 132
    return p


@pytest.fixture
def compiled(monkeypatch):
    """As on a machine with a GPU: all kernels are there."""
    monkeypatch.setattr(kernel, "INTERPRET", False)


SHAPES = [(28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (57344, 8192), (256, 256)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_choice_can_run(n, k, compiled):
    for t, operand, grid, major in itertools.product((1, 2, 3, 16, 17, 100, 512, 8192), (INT8, BF16), (1, 0), (8, 9)):
        p = problem(t, n, k, operand=operand, grid=bool(grid), major=major)
        config = kernel.choose(p)
        assert config["kernel"] in p.kernels(), (t, operand, grid, major)
        if config["kernel"] == "wgmma":
            assert config["bm"] == 8 or config["bm"] < 2 * t
            assert config["splits"] <= max(1, k // 512)
        if config["kernel"] == "narrow":
            assert t <= config["bm"]
            assert p.narrow_stages(config["bm"], config["ctas"]) >= 2


def test_hopper_multiplies_grid_scales_with_wgmma_and_others_do_not(compiled):
    assert kernel.choose(problem(2048, 4096, 4096, operand=BF16))["kernel"] == "wgmma"
    assert kernel.choose(problem(2048, 4096, 4096, operand=BF16, grid=False))["kernel"] == "dense"
    assert kernel.choose(problem(2048, 4096, 4096))["kernel"] == "wgmma"
    assert kernel.choose(problem(2048, 4096, 4096, major=8))["kernel"] == "tile"
    assert kernel.choose(problem(2048, 4096, 4096, grid=False))["kernel"] == "tile"
    assert kernel.choose(problem(1, 4096, 4096, grid=False))["kernel"] == "gemv"
    assert kernel.choose(problem(1, 4096, 4096, operand=BF16))["kernel"] == "skinny"


@pytest.mark.parametrize(("n", "k"), [shape for shape in SHAPES if min(shape) > 256])
@pytest.mark.parametrize("operand", [INT8, BF16])
def test_t_is_left_to_the_product_where_wgmma_begins(n, k, operand, compiled):
    first = defer_from_of(n, k)
    for t in (first, first + 7, 64, 4096):
        config = kernel.choose(problem(t, n, k, operand=operand))
        assert config["kernel"] == ("narrow" if t <= 16 and operand == INT8 else "wgmma"), t
        assert config["bm"] >= 16, t  # 8 tokens are too few to share between two warpgroups
    if operand == INT8:  # before it prologue has t at the price of nothing, and no launch is added
        assert kernel.choose(problem(first - 1, n, k))["kernel"] == "skinny"


AFTER_A_POWER_OF_TWO = (65, 80, 160, 257, 320, 640)


@pytest.mark.parametrize(
    ("n", "k", "first", "slow"),
    [
        (28672, 4096, 256, ()),
        (4096, 14336, 256, (257, 320)),
        (6144, 4096, 256, AFTER_A_POWER_OF_TWO),
        (4096, 4096, 64, AFTER_A_POWER_OF_TWO),
    ],
)
def test_where_bf16_would_not_be_slower_the_report_says_so(n, k, first, slow):
    residual = torch.empty(n, k // 2, dtype=torch.uint8, device="meta")
    for t in (1, first - 1, first, 8192):
        floats, integers = (torch.empty(t, k, dtype=dtype, device="meta") for dtype in (BF16, INT8))
        assert kernel.remark(floats, None, None, residual) == (kernel.NO_FASTER if t >= first else None)
        assert kernel.remark(integers, None, None, residual) is None
    for t in (*AFTER_A_POWER_OF_TWO, 64, 81, 128, 161, 321, 641, 1025):
        integers = torch.empty(t, k, dtype=INT8, device="meta")
        assert kernel.remark(integers, None, None, residual) == (kernel.NO_FASTER if t in slow else None), t
        four_bits = (integers, None, None, residual, *[None] * 10, integers, 0.1)
        expected = 64 < t <= 640 if n * k <= 2**24 else t in slow
        assert kernel.remark(*four_bits) == (kernel.NO_FASTER if expected else None), t


@pytest.mark.parametrize("programs", [132, 264])
def test_the_last_round_is_cut_into_parts_that_run_at_once(programs):
    run = pytest.importorskip("tqcompile.kernels.run_wgmma")
    cut = 0
    for tiles, steps in itertools.product(range(1, 600, 7), (1, 4, 32, 112)):
        whole, parts = run.last_round(tiles, programs, steps)
        if parts == 1:
            assert whole == tiles
            continue
        cut += 1
        assert whole % programs == 0
        assert 0 < whole < tiles
        assert 2 <= parts <= 4
        assert (tiles - whole) * parts <= programs
        assert steps >= 2 * parts
    assert cut > 10


def test_t_is_made_by_as_many_programs_as_are_idle():
    share_of_t = pytest.importorskip("tqcompile.kernels.run_wgmma").share_of_t
    assert share_of_t(1, 132, 132, 32) == 1  # nobody is idle
    assert share_of_t(1, 128, 132, 32) == 4
    assert share_of_t(2, 128, 132, 32) == 2
    assert share_of_t(1, 10, 132, 32) == 8  # more parts would cost more than they save
    assert share_of_t(1, 10, 132, 4) == 2  # a part has two steps at least


@pytest.mark.parametrize("form", ["int8-grid-r64", "int8-g128-r0", "bfloat16-g128-r64", "bfloat16-grid-r64"])
def test_candidates_name_their_kernel_and_hold_what_it_needs(form):
    needs = {
        "gemv": {"rows", "warps", "unroll"},
        "skinny": {"rw", "ks", "unroll"},
        "narrow": {"bm", "splits", "ctas"},
        "wgmma": {"bm", "splits", "ctas"},
        "tile": {"bm", "bn", "warps", "stages"},
        "dense": set(),
    }
    for t in (1, 16, 64, 2048):
        found = kernel.candidates(4096, 4096, t, form)
        assert found or form == "int8-g128-r0"
        for config in found:
            assert set(config) == {"kernel"} | needs[config["kernel"]]


def test_a_configuration_that_cannot_run_is_refused():
    args = random_gemm_args(3, 64, 256, 16, BF16, BF16)
    with pytest.raises(ValueError, match=r"'wgmma'.* cannot run this problem"):
        kernel.launch(*args, config={"kernel": "wgmma", "bm": 8, "splits": 1, "ctas": 1})


def changed(i, value):
    args = list(random_gemm_args(3, 64, 256, 16, INT8, BF16, addend=True))
    args[i] = value(args[i])
    return args


@interpreted
@pytest.mark.parametrize(
    ("i", "value", "reason"),
    [
        (0, lambda x: x.float(), "an int8 operand comes with operand_scale"),
        (1, lambda s: s[:2], "operand_scale must be float32"),
        (2, lambda t: t.float(), "t must be"),
        (3, lambda w: w[:, :-1].contiguous(), "residual must be uint8"),
        (4, lambda s: s.int(), "residual_scale must be"),
        (4, lambda s: s.repeat(1, 4), "multiple of 64 channels"),
        (5, lambda c: c[:-1], "channel_scale must be"),
        (6, lambda u: u[:-1], "up must be uint8"),
        (7, lambda s: s.repeat(1, 9), "up_scale must be"),
        (8, lambda b: b[:-1], "bias must be"),
        (9, lambda a: a[:-1], "addend must be"),
        (10, lambda d: torch.float64, "output dtype must be"),
        (3, lambda w: w.t(), "contiguous"),
    ],
)
def test_what_is_unsupported_is_named(i, value, reason):
    assert reason in kernel.unsupported(*changed(i, value))
