"""The kernels of prologue on a real GPU: layer shapes of 8B and 70B models, odd shapes, streams, graphs, repetition."""

import contextlib

import pytest
import torch
from kernel_bounds import PROLOGUE_CASES, random_prologue_args, worst_prologue

pytest.importorskip("triton")
from tqcompile import ops
from tqcompile.kernels import prologue as kernel
from tqcompile.ops.twin_gemm import from_planes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16 = torch.bfloat16
# K, kind, other: attention input, o_proj, gate/up input, down_proj of an 8B model; down_proj of a 70B one.
SITES = [
    (4096, "rms_norm", False),
    (4096, "rms_norm", True),
    (4096, "none", False),
    (14336, "silu_mul", True),
    (28672, "silu_mul", True),
]


def run(*args, **options):
    assert kernel.unsupported(*args) is None
    # Fresh memory is NaN or the largest integer. Only around launches: cuBLAS refuses this mode.
    torch.use_deterministic_algorithms(True)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        return kernel.launch(*args, **options)


def eight_bit(args):
    return (*args[:-2], 8, 0.0)


def worst(args, **options) -> float:
    eight = run(*eight_bit(args), **options) if args[-2] == 4 else None
    return worst_prologue(run(*args, **options), args, eight)


def site(t, k, kind, other, act_bits=8, block=128, rank=64, scaled=False):
    return random_prologue_args(t, k, rank, 128, block, scaled, kind, other, BF16, act_bits, device="cuda")


@pytest.mark.parametrize("act_bits", [8, 4, 16])
@pytest.mark.parametrize(("k", "kind", "other"), SITES)
def test_layer_shapes_are_within_their_bound(k, kind, other, act_bits):
    for t in (1, 2, 5, 16, 17, 64, 65, 100, 2048):
        for block in (128, None):
            error = worst(site(t, k, kind, other, act_bits, block))
            assert error <= 1, f"T={t}, rotation {block}: error is {error:.3g} times its bound"


@pytest.mark.parametrize(("k", "kind", "other"), SITES)
def test_natural_order_has_the_same_values(k, kind, other):
    for t in (1, 16, 100):
        args = site(t, k, kind, other, 16, rank=None)
        operand, natural = run(*args)[0], run(*args, False)[0]
        assert torch.equal(natural, from_planes(operand))


@pytest.mark.parametrize(
    ("t", "k", "rank", "group", "block", "scaled", "kind", "other", "dtype", "act_bits"), PROLOGUE_CASES
)
def test_odd_shapes_are_within_their_bound(t, k, rank, group, block, scaled, kind, other, dtype, act_bits):
    args = random_prologue_args(t, k, rank, group, block, scaled, kind, other, dtype, act_bits, device="cuda")
    assert worst(args) <= 1


@pytest.mark.parametrize("rank", [None, 2, 16, 48, 128])
def test_ranks(rank):
    for t in (1, 7, 40, 300):
        for act_bits in (8, 16):
            error = worst(site(t, 1024, "rms_norm", True, act_bits, 64, rank, scaled=True))
            assert error <= 1, f"T={t}: error is {error:.3g} times its bound"


def test_one_wrong_weight_is_seen():
    args = list(site(16, 4096, "none", False))
    result = run(*args)
    args[5] = args[5].clone()
    args[5][:, :2] ^= 0x88
    assert worst_prologue(result, args) > 1


@pytest.mark.parametrize(("k", "kind", "other"), SITES[1:4])
def test_repeated_launches_give_the_same_bits(k, kind, other):
    for t in (1, 16, 60, 512):
        args = site(t, k, kind, other)
        first = run(*args)
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(200):
            for a, b in zip(kernel.launch(*args), first, strict=True):
                different += (a.view(torch.uint8) != b.view(torch.uint8)).sum()
        assert different.item() == 0


@pytest.mark.parametrize("t", [1, 300])
def test_graph_replay_and_two_streams(t):
    args = [site(t, 4096, "rms_norm", True), site(t, 14336, "silu_mul", True)]
    graphs = []
    for one in args:
        kernel.launch(*one)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = kernel.launch(*one)
        graphs.append((graph, result))
    expected = [kernel.launch(*one) for one in args]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(50):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, result), want in zip(graphs, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))


def test_no_tokens_and_strided_rows():
    empty = site(0, 4096, "rms_norm", True)
    assert [tuple(a.shape) for a in run(*empty)] == [(0, 4096), (0, 1), (0, 64), (0, 4096), (0,)]
    args = list(site(6, 1024, "silu_mul", True))
    args[0], args[1] = args[0].reshape(2, 3, 1024)[:, ::2], args[1].reshape(2, 3, 1024)[:, ::2]
    assert worst_prologue(run(*args), args) <= 1
    args[0] = torch.randn(1024, 4, device="cuda", dtype=BF16).t().reshape(2, 2, 1024)
    assert worst_prologue(run(*args), args) <= 1


def test_the_op_runs_the_kernel_also_inside_inductor():
    args = site(4, 4096, "rms_norm", True)
    assert all(torch.equal(a, b) for a, b in zip(ops.prologue(*args), kernel.launch(*args), strict=True))
    compiled = torch.compile(lambda x: ops.prologue(x + 1, *args[1:]), mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(4, 4096, device="cuda", dtype=BF16)
            want = kernel.launch(x + 1, *args[1:])
            assert all(torch.equal(a, b) for a, b in zip(compiled(x), want, strict=True))
