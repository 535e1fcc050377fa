"""The op prologue: its contract with torch, its reference, and its Triton kernels in the interpreter, in float64."""

import pytest
import torch
from kernel_bounds import PROLOGUE_CASES, random_prologue_args, worst_prologue

from tqcompile import ops
from tqcompile.ops.prologue import prologue_reference
from tqcompile.ops.quantize_activation import transform_activation
from tqcompile.ops.twin_gemm import from_planes

BF16, FP32 = torch.bfloat16, torch.float32
CASE_NAMES = ("t", "k", "rank", "group", "block", "scaled", "kind", "other", "dtype", "act_bits")


def eight_bit(args: tuple) -> tuple:
    return (*args[:-2], 8, 0.0)


def worst(run, args: tuple) -> float:
    return worst_prologue(run(*args), args, run(*eight_bit(args)) if args[-2] == 4 else None)


@pytest.mark.parametrize(CASE_NAMES, PROLOGUE_CASES)
def test_the_reference_is_within_its_bound(t, k, rank, group, block, scaled, kind, other, dtype, act_bits):
    args = random_prologue_args(t, k, rank, group, block, scaled, kind, other, dtype, act_bits, seed=0)
    assert worst(prologue_reference, args) <= 1


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (0, 64), (64,)])
def test_the_op_keeps_the_contract_of_torch_library(shape):
    forms = (("none", False, 8, None), ("rms_norm", True, 4, 6), ("rms_norm", False, 16, 6), ("silu_mul", True, 8, 6))
    for i, (kind, other, bits, rank) in enumerate(forms):
        dtype = (FP32, torch.float16, BF16)[i % 3]
        block = 16 if i % 2 else None
        args = random_prologue_args(shape[:-1], 64, rank, 32, block, i % 2 == 0, kind, other, dtype, bits, seed=i)
        if shape[0] == 0:  # opcheck cannot copy the empty half of a tensor
            args = tuple(
                torch.clone(a, memory_format=torch.contiguous_format) if torch.is_tensor(a) else a for a in args
            )
        torch.library.opcheck(ops.prologue, args)


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("kind", ["none", "rms_norm", "silu_mul"])
def test_it_is_what_the_modules_of_transformers_and_the_portable_ops_compute(kind, act_bits):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, other, gain, scale, turn, down, down_scale, *_, ratio = args = random_prologue_args(
        5, 128, 8, 32, 32, True, kind, kind != "none", BF16, act_bits, seed=1
    )
    v, up, up_scale = x, torch.full((24, 4), 0x31, dtype=torch.uint8), torch.ones(24, 1)
    if kind == "rms_norm":
        norm = LlamaRMSNorm(128, eps=1e-5)
        norm.weight.data = gain
        v = norm(x + other).detach()
    elif kind == "silu_mul":
        v = torch.nn.functional.silu(x) * other
    residual, residual_scale = torch.randint(0, 256, (24, 64), dtype=torch.uint8), torch.rand(24, 4)
    if act_bits == 16:
        q, q_scale = transform_activation(v, scale, turn), None
    else:
        q, q_scale = ops.quantize_activation(v, scale, turn)
    weights = (residual, residual_scale, down, down_scale, up, up_scale, None, ratio, BF16)
    operand, operand_scale, t, h, *_ = ops.prologue(*args)
    operand_scale = operand_scale if act_bits != 16 else None
    got = ops.twin_gemm(operand, operand_scale, t, residual, residual_scale, None, up, up_scale, None, None, BF16)
    want = ops.twin_linear(q, q_scale, *weights)
    # The same integers. With 4 bits the scale is divided before the product and not after: the last bit may differ.
    torch.testing.assert_close(got, want, rtol=2**-7 if act_bits == 4 else 0, atol=0)
    if act_bits == 8:
        assert torch.equal(from_planes(operand), q)
    assert h.numel() == (x.numel() if kind == "rms_norm" else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gelu"}, "kind must be one of"),
        ({"gain": None}, "gain belongs to kind"),
        ({"gain": torch.ones(64)}, "gain must be"),
        ({"other": torch.ones(4, 64)}, "other must have the dtype of x"),
        ({"kind": "none", "gain": None}, "takes no other"),
        ({"kind": "silu_mul", "gain": None, "other": None}, "needs other"),
        ({"act_bits": 6}, "act_bits must be"),
        ({"act_ratio": 0.5}, "act_ratio > 0 belongs to 4 bits"),
        ({"down_scale": None}, "come together"),
        ({"down": torch.zeros(6, 16, dtype=torch.uint8)}, "down must be"),
        ({"rotation": torch.ones(48, 48)}, "must divide K"),
        ({"input_scale": torch.ones(32)}, "input_scale must be"),
        ({"planes": False}, "natural order is for"),
    ],
)
def test_wrong_arguments_are_refused_while_tracing(change, message):
    names = [argument.name for argument in torch.ops.tqcompile.prologue.default._schema.arguments]
    args = random_prologue_args(4, 64, 6, 32, 16, True, "rms_norm", True, BF16, 8)
    args = dict(zip(names, args, strict=False)) | change
    if change.get("gain") is not None:
        args["gain"] = torch.ones(32, dtype=BF16)
    with pytest.raises(RuntimeError, match=message):
        ops.prologue(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args.values()))


pytest.importorskip("triton")
from tqcompile.kernels import low_rank  # noqa: E402  (only where Triton is)
from tqcompile.kernels import prologue as kernel  # noqa: E402

interpreted = pytest.mark.skipif(not kernel.INTERPRET, reason="a GPU is used: see tests/gpu")


@pytest.fixture
def _poisoned_outputs():
    """Fresh memory reads as NaN, or the largest integer: a value the kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(*args, **options):
    assert kernel.unsupported(*args) is None
    return kernel.launch(*args, **options)


@interpreted
@pytest.mark.usefixtures("_poisoned_outputs")
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(CASE_NAMES, PROLOGUE_CASES)
def test_the_kernel_is_within_its_bound(t, k, rank, group, block, scaled, kind, other, dtype, act_bits):
    args = random_prologue_args(t, k, rank, group, block, scaled, kind, other, dtype, act_bits, seed=2)
    assert worst(run, args) <= 1


@interpreted
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_every_plan_gives_the_same_integers():
    args = random_prologue_args(3, 256, 16, 64, 64, False, "rms_norm", True, BF16, 8, seed=3)
    results = [run(*args, plan=kernel.Plan(parts, ranks, 1, 16, 64, 4)) for parts, ranks in ((1, 16), (8, 2), (1, 0))]
    results.append(run(*args, plan=kernel.Plan(1, 0, 1, 16, 64, 4)))  # the counters of the first are clean again
    assert torch.equal(results[3][2], results[2][2])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result[:2], results[0][:2], strict=True))
        assert worst_prologue(result, args) <= 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("kind", ["none", "rms_norm", "silu_mul"])
def test_natural_order_has_the_same_values(kind):
    for block, k in ((32, 96), (None, 130)):
        args = random_prologue_args(3, k, None, 32, block, kind == "none", kind, kind != "none", BF16, 16, seed=6)
        for compute in (prologue_reference, *([run] if kernel.INTERPRET else [])):
            operand, _, _, h, *_ = compute(*args)
            natural, _, _, same_h, *_ = compute(*args, False)
            assert torch.equal(natural, from_planes(operand))
            assert torch.equal(same_h, h)
        torch.library.opcheck(ops.prologue, (*args, False))


@interpreted
@pytest.mark.usefixtures("_poisoned_outputs")
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("block", [None, 32])
def test_four_bits_come_with_the_eight_that_a_deferred_t_is_made_from(block):
    args = random_prologue_args(5, 128, 8, 64, block, False, "rms_norm", True, BF16, 4, seed=7)
    for compute in (run, prologue_reference):
        q8, scale8, *_ = compute(*eight_bit(args))
        operand, scale, _, h, wide = compute(*args, True, 5)
        assert torch.equal(wide, q8)
        torch.testing.assert_close(scale * args[-1], scale8)
        assert all(
            torch.equal(a, b)
            for a, b in zip((operand, scale, h), compute(*args)[:2] + compute(*args)[3:4], strict=True)
        )
        not_deferred = compute(*args, True, 6)
        assert torch.equal(not_deferred[2], compute(*args)[2])
        assert not_deferred[4].shape == args[0].shape
        assert compute(*args)[4].numel() == compute(*eight_bit(args), True, 5)[4].numel() == 0
    torch.library.opcheck(ops.prologue, (*args, True, 5), test_utils=("test_schema", "test_faketensor"))


@interpreted
def test_no_tokens_and_one_token_without_leading_dimensions():
    empty = random_prologue_args((2, 0), 128, 8, 128, None, False, "rms_norm", True, BF16, 8)
    assert [tuple(a.shape) for a in run(*empty)] == [(2, 0, 128), (2, 0, 1), (2, 0, 8), (2, 0, 128), (0,)]
    one = random_prologue_args((), 128, 8, 128, None, False, "none", False, BF16, 8)
    assert worst_prologue(run(*one), one) <= 1


def test_the_bound_sees_one_wrong_value():
    args = random_prologue_args(4, 128, 8, 128, 32, False, "rms_norm", True, BF16, 8, seed=4)
    operand, scale, t, h, *_ = prologue_reference(*args)
    moved = operand.clone()
    moved[2, 5] += 3
    assert worst_prologue((moved, scale, t, h), args) > 1
    assert worst_prologue((operand, scale * 1.02, t, h), args) > 1
    assert worst_prologue((operand, scale, t * (1 + 2**-6), h), args) > 1


@pytest.mark.skipif(not kernel.INTERPRET, reason="arguments are on the CPU")
def test_refusals_name_the_reason():
    good = random_prologue_args(2, 128, 8, 128, 32, False, "rms_norm", True, BF16, 8, seed=5)
    names = [argument.name for argument in torch.ops.tqcompile.prologue.default._schema.arguments]

    def refused(**changes):
        return kernel.unsupported(*(dict(zip(names, good, strict=False)) | changes).values())

    assert refused() is None
    assert "rotation" in refused(rotation=torch.eye(8))
    assert "input_scale" in refused(input_scale=torch.ones(64))
    assert "down must" in refused(down=torch.zeros(130, 64, dtype=torch.uint8))
    assert "contiguous" in refused(down=torch.zeros(64, 8, dtype=torch.uint8).t())
    assert "group" in refused(down_scale=torch.ones(8, 8))
    assert "dtype of x" in refused(gain=torch.ones(128))
    assert "device" in refused(gain=torch.ones(128, dtype=BF16, device="meta"))
    wide = random_prologue_args(2, 40000, None, 32, None, False, "none", False, BF16, 8)
    assert "at most 32768" in kernel.unsupported(*wide)
    single = random_prologue_args(2, 128, 8, 128, 32, False, "none", False, FP32, 8)
    assert "float32 rotation" in kernel.unsupported(*single)


def test_a_plan_fits_every_shape():
    for tiles in (1, 5, 128, 600):
        for steps in (1, 3, 32, 112):
            assert 1 <= low_rank.choose_splits(tiles, steps, 132) <= steps
    assert low_rank.choose_splits(8, 112, 132) * 8 >= 64  # 128 tokens of a down projection keep most of a GPU busy
    for t in (1, 2, 5, 16, 17, 64, 65, 512, 8192):
        for k, group in ((64, 32), (96, 96), (4096, 128), (14336, 128), (28672, 256)):
            for rank in (0, 2, 48, 64, 128):
                for block in (0, 32):
                    plan = kernel.choose_plan(t, k, rank, group, block)
                    assert plan.rows * plan.columns >= k
                    assert plan.ranks == 0 or (plan.parts * plan.ranks >= rank and plan.ranks % plan.step == 0)
                    assert plan.rows * plan.columns // (32 * plan.warps) <= 64
