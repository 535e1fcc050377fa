"""The Triton kernels on a real GPU: layer shapes of an 8B model, odd shapes, streams, graphs, repetition."""

import contextlib

import pytest
import torch
from kernel_bounds import (
    INT8_CASES,
    QUANTIZE_CASES,
    TWIN_CASES,
    random_int8_args,
    random_twin_args,
    worst_int8_linear,
    worst_quantize_activation,
    worst_twin_linear,
)

pytest.importorskip("triton")
from tqcompile import ops
from tqcompile.kernels import int8_linear as int8_kernel
from tqcompile.kernels import quantize_activation as quantize_kernel
from tqcompile.kernels import twin_linear as twin_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
TOKENS = [1, 3, 16, 100, 2048]
FORMS = ["w4a8", "w4a4", "w4a16"]
BF16 = torch.bfloat16


@contextlib.contextmanager
def poisoned_memory():
    """Fresh memory is NaN or the largest integer. Only around launches: cuBLAS refuses this mode."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_twin(args, **options):
    assert twin_kernel.unsupported(*args) is None
    with poisoned_memory():
        return twin_kernel.launch(*args, **options)


def run_quantize(*args):
    assert quantize_kernel.unsupported(*args) is None
    with poisoned_memory():
        return quantize_kernel.launch(*args)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_layer_shapes_are_within_their_bound(n, k, form):
    for t in TOKENS:
        args = random_twin_args(t, n, k, 64, form, BF16, device="cuda")
        worst = worst_twin_linear(run_twin(args), args)
        assert worst <= 1, f"T={t}: error is {worst:.3g} times its bound"


@pytest.mark.parametrize(("t", "n", "k", "rank", "form", "dtype", "options"), TWIN_CASES)
def test_odd_shapes_are_within_their_bound(t, n, k, rank, form, dtype, options):
    args = random_twin_args(t, n, k, rank, form, dtype, device="cuda", **options)
    assert worst_twin_linear(run_twin(args), args) <= 1


@pytest.mark.parametrize("rank", [None, 8, 32, 48, 128])
@pytest.mark.parametrize("form", FORMS)
def test_ranks_are_within_their_bound(rank, form):
    for t in (5, 24, 300):
        args = random_twin_args(t, 1000, 1024, rank, form, BF16, device="cuda", bias=t != 5)
        worst = worst_twin_linear(run_twin(args), args)
        assert worst <= 1, f"T={t}: error is {worst:.3g} times its bound"


def test_one_wrong_weight_is_seen():
    args = random_twin_args(16, 512, 4096, 64, "w4a8", BF16, device="cuda")
    y = run_twin(args)
    for i in (2, 4, 6):  # residual, down, up
        wrong = list(args)
        wrong[i] = args[i].clone()
        wrong[i][:, :8] ^= 0x88
        assert worst_twin_linear(y, tuple(wrong)) > 1


@pytest.mark.parametrize(("t", "k", "block", "scaled", "dtype"), QUANTIZE_CASES)
def test_quantize_activation_odd_shapes(t, k, block, scaled, dtype):
    x = torch.randn(*(t if isinstance(t, tuple) else (t,)), k, device="cuda").to(dtype)
    scale = torch.rand(k, device="cuda") + 0.5 if scaled else None
    turn = torch.linalg.qr(torch.randn(block, block, device="cuda"))[0] if block else None
    assert worst_quantize_activation(*run_quantize(x, scale, turn), x, scale, turn) <= 1


@pytest.mark.parametrize("block", [None, 64, 128])
@pytest.mark.parametrize("k", [4096, 14336])
def test_quantize_activation_layer_shapes(k, block):
    turn = torch.linalg.qr(torch.randn(block, block, device="cuda"))[0] if block else None
    for t in TOKENS:
        x, scale = torch.randn(t, k, device="cuda", dtype=BF16), torch.rand(k, device="cuda") + 0.5
        worst = worst_quantize_activation(*run_quantize(x, scale, turn), x, scale, turn)
        assert worst <= 1, f"T={t}: error is {worst:.3g} times its bound"


def test_no_tokens():
    args = random_twin_args(0, 512, 1024, 64, "w4a8", BF16, device="cuda")
    assert run_twin(args).shape == (0, 512)
    x_q, x_scale = run_quantize(torch.zeros(0, 1024, device="cuda"), None, None)
    assert (x_q.shape, x_scale.shape) == ((0, 1024), (0, 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", [1, 16, 60, 512])
def test_repeated_launches_give_the_same_bits(t, form):
    args = random_twin_args(t, 4096, 4096, 64, form, BF16, device="cuda")
    first = run_twin(args)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        different += (twin_kernel.launch(*args).view(torch.int16) != first.view(torch.int16)).sum()
    assert different.item() == 0


def test_two_streams_do_not_disturb_each_other():
    cases = [random_twin_args(4, 4096, 4096, 64, form, BF16, device="cuda") for form in ("w4a8", "w4a16")]
    expected = [twin_kernel.launch(*args) for args in cases]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = [[], []]
    torch.cuda.synchronize()
    for _ in range(100):
        for i in (0, 1):
            with torch.cuda.stream(streams[i]):
                results[i].append(twin_kernel.launch(*cases[i]))
    torch.cuda.synchronize()
    for i in (0, 1):
        assert all(torch.equal(y, expected[i]) for y in results[i])


def _captured(args):
    """A graph of both kernels with a static input x: (graph, x, y)."""
    x = torch.randn(4, args[2].shape[1] * 2, device="cuda", dtype=BF16)

    def both():
        return twin_kernel.launch(*quantize_kernel.launch(x, None, None), *args[2:])

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = both()
    return graph, x, y


def test_graph_replay_equals_the_eager_launch():
    args = random_twin_args(4, 4096, 4096, 64, "w4a8", BF16, device="cuda")
    graph, x, y = _captured(args)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        eager = (*quantize_kernel.launch(x, None, None), *args[2:])
        assert torch.equal(y, twin_kernel.launch(*eager))
        assert worst_twin_linear(y, eager) <= 1


def test_two_graphs_replay_at_the_same_time():
    args = [random_twin_args(4, 4096, 4096, 64, "w4a8", BF16, device="cuda") for _ in range(2)]
    captured = [_captured(a) for a in args]
    expected = []
    for graph, _, y in captured:
        graph.replay()
        expected.append(y.clone())
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(50):
        for (graph, _, _), stream in zip(captured, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, _, y), one in zip(captured, expected, strict=True):
            assert torch.equal(y, one)


def test_the_op_runs_the_kernel():
    args = random_twin_args(4, 512, 1024, 64, "w4a8", BF16, device="cuda")
    assert torch.equal(ops.twin_linear(*args), twin_kernel.launch(*args))


def test_the_op_inside_inductor_cuda_graphs():
    args = random_twin_args(4, 4096, 4096, 64, "w4a16", BF16, device="cuda")
    compiled = torch.compile(lambda x: ops.twin_linear(x + 1, *args[1:]), mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(4, 4096, device="cuda", dtype=BF16)
            assert torch.equal(compiled(x), twin_kernel.launch(x + 1, *args[1:]))


HEADS = [(t, n, k, k // 128, BF16, False) for t in (1, 16, 33, 100, 513) for n, k in ((128256, 4096), (151936, 1024))]


@pytest.mark.parametrize("case", [*INT8_CASES, *HEADS])
def test_int8_linear_is_within_its_bound(case):
    args = random_int8_args(*case, device="cuda")
    assert int8_kernel.unsupported(*args) is None
    with poisoned_memory():
        y = int8_kernel.launch(*args)
    assert worst_int8_linear(y, *args) <= 1
    for _ in range(20):
        assert torch.equal(int8_kernel.launch(*args), y)


def test_the_op_int8_linear_runs_the_kernel_and_is_captured():
    args = random_int8_args(3, 1000, 512, 4, BF16, True, device="cuda")
    expected = int8_kernel.launch(*args)
    assert torch.equal(torch.ops.tqcompile.int8_linear(*args), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.tqcompile.int8_linear(*args)
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
