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
TOKENS = [1, 3, 16, 100, 2048]


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
    with poisoned_memory() if args[0].shape[0] <= kernel.DENSE_TOKENS else contextlib.nullcontext():
        return kernel.launch(*args)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_layer_shapes_are_within_their_bound(n, k, bits):
    for t in TOKENS:
        shift, groups = ("zero", k // 128) if bits == 3 else ("offset", 1)
        args = random_arguments(t, n, k, groups, bits, torch.bfloat16, shift, t == 3, device="cuda")
        assert worst(run(args), *args, rounded_weights=t > kernel.DENSE_TOKENS) <= 1, t


@pytest.mark.parametrize("case", CASES)
def test_odd_shapes_are_within_their_bound(case):
    args = random_arguments(*case, device="cuda")
    assert worst(run(args), *args, rounded_weights=case[0] > kernel.DENSE_TOKENS) <= 1


@pytest.mark.parametrize("scheme", ["d2-w2a16", "d2-w3a16", "unisvq-w2a16", "twin-w2a16"])
def test_a_compiled_model_runs_the_kernel(scheme):
    import tqcompile
    from tqcompile.backend import reports

    model = tiny("Qwen3").cuda()
    ids = tokens(3, 9, seed=7).cuda()
    tqcompile.compile(model, tokens(), scheme=scheme, rank=16, group_size=64, tune=2, backend=None, progress=False)
    eager = model(input_ids=ids).logits
    model.compile(backend="twinquant", dynamic=True, options={"quantize": False})
    found = model(input_ids=ids).logits
    assert (found - eager).norm() < 1e-3 * eager.norm()
    assert sum(form.startswith("triton") for form in reports[-1].lowered.values()) >= 14
    on_cpu = model.cpu()(input_ids=ids.cpu()).logits
    assert (found.cpu() - on_cpu).norm() < 1e-2 * on_cpu.norm()
    torch._dynamo.reset()


def test_one_result_whatever_runs_beside_it_and_in_a_graph():
    args = random_arguments(2, 4096, 4096, 32, 2, torch.bfloat16, "zero", False, device="cuda")
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
