"""The kernel of ``lattice_linear`` on a real GPU: layer shapes of an 8B model, odd shapes, graphs, repetition."""

import contextlib

import pytest
import torch
from lattice_bounds import CASES, random_arguments, worst
from tiny_models import tiny, tokens

pytest.importorskip("triton")
from tqcompile import ops
from tqcompile.kernels import lattice_linear as kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
TOKENS = [1, 2, 3, 16, 40, 64, 100, 2048]


@contextlib.contextmanager
def poisoned_memory():
    """Fresh memory is NaN. Only around our launches: cuBLAS refuses this mode."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(args):
    assert kernel.unsupported(*args) is None
    with contextlib.nullcontext() if kernel.describe(*args) == "dense" else poisoned_memory():
        return kernel.launch(*args)


def check_cut(args, cut, form="exact"):
    """One configuration: within the bound, and the same bits every time."""
    with poisoned_memory():
        first = kernel.launch(*args, tile=cut)
        again = [kernel.launch(*args, tile=cut) for _ in range(5)]
    assert worst(first, *args, form=form) <= 1, cut
    assert all(torch.equal(y, first) for y in again), cut


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_layer_shapes_are_within_their_bound(n, k, bits):
    for t in TOKENS:
        shift, groups = ("zero", k // 128) if bits == 3 else ("offset", 1)
        args = random_arguments(t, n, k, groups, bits, torch.bfloat16, shift, t == 3, device="cuda")
        assert kernel.describe(*args) == (
            "gemv" if t == 1 else "skinny" if t <= 16 else "wgmma" if t <= 1024 else "dense"
        )
        assert worst(run(args), *args, form=kernel.describe(*args)) <= 1, t


@pytest.mark.parametrize("case", CASES)
def test_odd_shapes_are_within_their_bound(case):
    args = random_arguments(*case, device="cuda")
    assert worst(run(args), *args, form=kernel.describe(*args)) <= 1


@pytest.mark.parametrize("scheme", ["d2-w2a16", "d2-w3a16", "unisvq-w2a16", "twin-w2a16"])
def test_a_compiled_model_runs_the_kernel(scheme):
    import tqcompile
    from tqcompile.backend import reports

    model = tiny("Qwen3").cuda()
    ids = tokens(3, 9, seed=7).cuda()
    tqcompile.compile(model, tokens(), scheme=scheme, rank=32, group_size=64, tune=2, backend=None, progress=False)
    eager = model(input_ids=ids).logits
    model.compile(backend="twinquant", dynamic=True, options={"quantize": False})
    found = model(input_ids=ids).logits
    assert (found - eager).norm() < 1e-3 * eager.norm()
    assert all(form.startswith("triton") for form in reports[-1].lowered.values()), reports[-1].lowered
    assert len(reports[-1].lowered) >= 8  # four products a layer, siblings merged
    on_cpu = model.cpu()(input_ids=ids.cpu()).logits
    assert (found.cpu() - on_cpu).norm() < 1e-2 * on_cpu.norm()
    torch._dynamo.reset()


# (T, N, K, groups, bits, dtype, shift, bias): odd N, one group a row, several units a group, units that KS leaves over.
SKINNY_CASES = [
    (1, 40, 128, 1, 2, torch.bfloat16, "zero", True),
    (1, 75, 1152, 9, 2, torch.bfloat16, "offset", False),
    (2, 133, 640, 5, 3, torch.bfloat16, "zero", True),
    (3, 130, 768, 3, 2, torch.float16, "zero", False),
    (7, 70, 512, 1, 3, torch.float16, "offset", True),
    (8, 33, 1408, 11, 3, torch.bfloat16, "none", False),
    (9, 57, 896, 7, 2, torch.float16, "none", True),
    (13, 200, 384, 1, 2, torch.bfloat16, "zero", True),
    (16, 91, 1024, 8, 3, torch.bfloat16, "offset", True),
    (16, 49, 2048, 16, 2, torch.bfloat16, "offset", False),
    (15, 66, 256, 2, 3, torch.float16, "zero", False),
]


@pytest.mark.parametrize("case", SKINNY_CASES)
def test_the_skinny_form_is_within_its_bound_in_every_cut(case):
    args = random_arguments(*case, device="cuda", seed=case[1])
    assert kernel.describe(*args) == ("gemv" if case[0] == 1 else "skinny")
    assert worst(run(args), *args) <= 1
    for cut in ((1, 1, 1, 1), (1, 2, 4, 2), (2, 1, 4, 3), (2, 2, 8, 1), (2, 1, 8, 4, 128)):
        check_cut(args, kernel.Skinny(*cut))


# N is a multiple of 8; tokens and rows that tiles leave over, one group a row, several steps a group.
WGMMA_CASES = [
    (17, 136, 256, 2, 2, torch.bfloat16, "zero", True),
    (30, 264, 1152, 9, 2, torch.bfloat16, "offset", False),
    (65, 72, 640, 5, 3, torch.bfloat16, "zero", False),
    (70, 128, 512, 1, 3, torch.bfloat16, "offset", True),
    (129, 200, 768, 3, 2, torch.float16, "zero", True),
    (300, 96, 384, 3, 2, torch.float16, "offset", False),
    (257, 320, 1408, 11, 3, torch.float16, "zero", True),
    (40, 64, 128, 1, 3, torch.float16, "offset", False),
    (513, 104, 1024, 8, 2, torch.bfloat16, "none", True),
    (20, 248, 2048, 8, 3, torch.bfloat16, "none", False),
]


@pytest.mark.parametrize("case", WGMMA_CASES)
def test_the_wgmma_form_is_within_its_bound_in_every_cut(case):
    args = list(random_arguments(*case, device="cuda", seed=case[1]))
    args[2] = args[2].to(case[5])  # scales of another dtype go through the other forms
    assert kernel.describe(*args) == "wgmma"
    assert worst(run(args), *args, form="wgmma") <= 1
    for cut in ((16, 1, 2), (32, 2, 1), (64, 3, 2), (128, 1, 1), (128, 2, 1), (256, 1, 1), (256, 3, 1)):
        if cut[1] * 2 > case[2] // 128:
            continue
        check_cut(args, kernel.Wgmma(*cut), form="wgmma")


# Odd N, units that warps or pairs leave over, several units a group, one group a row.
GEMV_CASES = [
    (1, 40, 128, 1, 2, torch.bfloat16, "zero", True),
    (1, 75, 1152, 9, 2, torch.bfloat16, "offset", False),
    (1, 91, 1024, 8, 3, torch.float16, "zero", True),
    (1, 33, 1408, 11, 3, torch.bfloat16, "none", False),
    (1, 133, 640, 5, 3, torch.bfloat16, "offset", True),
    (1, 70, 512, 1, 2, torch.float16, "zero", True),
    (1, 130, 768, 3, 3, torch.float16, "zero", False),
    (1, 49, 2048, 16, 2, torch.bfloat16, "none", True),
    (1, 35, 8320, 65, 3, torch.bfloat16, "zero", False),
]


@pytest.mark.parametrize("case", GEMV_CASES)
def test_the_gemv_form_is_within_its_bound_in_every_cut(case):
    args = random_arguments(*case, device="cuda", seed=case[1])
    assert kernel.describe(*args) == "gemv"
    assert worst(run(args), *args) <= 1
    cuts = ((1, 1, 4, 1), (1, 2, 8, 4), (2, 4, 2, 2), (2, 1, 4, 3), (4, 1, 8, 4, 0, 128), (1, 1, 16, 7, 0, 64))
    ahead = ((1, 1, 4, 1, 3), (1, 2, 8, 4, 1), (2, 4, 2, 2, 2), (2, 1, 4, 3, 1), (2, 1, 8, 1, 3), (1, 1, 4, 2, 2))
    for cut in (cuts + ahead)[GEMV_CASES.index(case) % 2 :: 2]:  # compiling one takes seconds
        check_cut(args, kernel.Gemv(*cut))


def test_the_gemv_form_with_channels_of_very_different_sizes():
    args = list(random_arguments(1, 64, 1024, 8, 2, torch.bfloat16, "offset", False, device="cuda", seed=5))
    sizes = torch.logspace(-3, 3, 1024, device="cuda")[torch.randperm(1024, device="cuda")]
    for factor in (1.0, 1e-30, 1e30):
        args[0] = (torch.randn(1, 1024, device="cuda") * sizes * factor).bfloat16()
        assert kernel.describe(*args) == "gemv"
        assert worst(run(args), *args) <= 1, factor


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_gemv_form_hides_nothing_that_is_not_finite(value):
    args = list(random_arguments(1, 40, 512, 4, 2, torch.bfloat16, "zero", False, device="cuda", seed=6))
    args[0][0, 77] = value
    assert kernel.describe(*args) == "gemv"
    assert not torch.isfinite(run(args)).any()


def test_the_bound_sees_one_wrong_code():
    args = random_arguments(1, 40, 256, 2, 2, torch.bfloat16, "zero", True, device="cuda", seed=2)
    wrong = list(args)
    wrong[1] = args[1].clone()
    wrong[1][7, 3] ^= 2
    assert worst(run(args), *wrong) > 1


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("t", [1, 2, 12, 40, 200])
def test_one_result_whatever_runs_beside_it_and_in_a_graph(t, bits):
    args = random_arguments(t, 4096, 4096, 32, bits, torch.bfloat16, "zero", False, device="cuda")
    first = ops.lattice_linear(*args)
    for _ in range(50):
        assert torch.equal(ops.lattice_linear(*args), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.lattice_linear(*args)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, first)
