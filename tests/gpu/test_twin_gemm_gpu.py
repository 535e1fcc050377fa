"""Every kernel of twin_gemm on a real GPU: odd and large shapes, repetition, streams, graphs."""

import pytest
import torch
from gemm_bounds import random_down, random_gemm_args, worst_twin_gemm

pytest.importorskip("triton")
from tqcompile.cuda_graph import capture
from tqcompile.kernels import split_counters
from tqcompile.kernels import twin_gemm as kernel
from tqcompile.kernels.spare_rows import rows_in_storage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16, FP16, INT8 = torch.bfloat16, torch.float16, torch.int8
GEMV = {"kernel": "gemv", "rows": 2, "warps": 4, "unroll": 4}
SKINNY = {"kernel": "skinny", "rw": 1, "ks": 4, "unroll": 2}


def wgmma(bm, splits=1, ctas=1):
    return {"kernel": "wgmma", "bm": bm, "splits": splits, "ctas": ctas}


def narrow(bm, splits=1, ctas=1):
    return {**wgmma(bm, splits, ctas), "kernel": "narrow"}


def random_args(*args, **options):
    return random_gemm_args(*args, device="cuda", **options)


def run(args, config=None):
    assert kernel.unsupported(*args) is None
    if config is not None and config["kernel"] in ("wgmma", "narrow") and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma needs a Hopper GPU")
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    try:
        return kernel.launch(*args, config=config)
    finally:
        torch.use_deterministic_algorithms(False)


# config, t, n, k, rank, operand, dtype, options
ODD = [
    (GEMV, 1, 70, 128, 32, INT8, BF16, {}),
    (GEMV, 2, 131, 1152, 128, INT8, FP16, {"addend": True, "grid": False}),
    ({**GEMV, "rows": 4}, 1, 70, 14336, None, INT8, BF16, {"bias": False}),
    (GEMV, 4, 1000, 896, 16, INT8, BF16, {"group": 64, "grid": False}),
    (GEMV, 1, 33, 2048, 64, INT8, BF16, {"group": 256}),
    (SKINNY, 3, 70, 128, 8, INT8, BF16, {"addend": True}),
    (SKINNY, 17, 131, 1152, 128, INT8, FP16, {"bias": False, "grid": False}),
    ({**SKINNY, "rw": 2, "ks": 8}, 32, 1000, 14336, 64, INT8, BF16, {}),
    ({**SKINNY, "rw": 4, "ks": 1}, 8, 70, 384, None, INT8, BF16, {"group": 384}),
    (SKINNY, 1, 70, 384, 48, BF16, BF16, {"addend": True, "grid": False}),
    (SKINNY, 9, 1000, 2048, 64, FP16, FP16, {"group": 256}),
    (wgmma(8, ctas=2), 3, 72, 128, 32, INT8, BF16, {"addend": True}),
    (wgmma(16, ctas=3), 16, 200, 384, 64, INT8, FP16, {"bias": False}),
    (wgmma(16, 3, ctas=3), 13, 200, 2048, 128, INT8, BF16, {}),
    (wgmma(32, 4, ctas=2), 33, 136, 2048, None, INT8, BF16, {"addend": True}),
    (wgmma(64, 2, ctas=2), 100, 264, 1152, 64, INT8, BF16, {"group": 384}),
    (wgmma(128), 300, 264, 640, 128, INT8, BF16, {}),
    (wgmma(128, 8), 130, 264, 4096, 64, INT8, BF16, {"addend": True}),
    (wgmma(256), 257, 1000, 384, 64, INT8, FP16, {"addend": True}),
    (wgmma(256, 3), 700, 136, 1536, 128, INT8, BF16, {}),
    (wgmma(256), 1000, 4096, 256, None, INT8, BF16, {}),
    (wgmma(8, ctas=2), 3, 72, 128, 32, BF16, BF16, {"addend": True}),
    (wgmma(16, 3, ctas=3), 13, 200, 2048, 128, FP16, FP16, {"bias": False}),
    (wgmma(32, 4, ctas=2), 33, 136, 2048, None, BF16, BF16, {"addend": True}),
    (wgmma(64, 2, ctas=2), 100, 264, 1152, 64, BF16, BF16, {"group": 384}),
    (wgmma(128, 8), 130, 264, 4096, 64, BF16, BF16, {"addend": True}),
    (wgmma(256), 257, 1000, 384, 64, FP16, FP16, {"addend": True}),
    (wgmma(256, 3), 700, 136, 1536, 64, BF16, BF16, {}),
    (wgmma(128), 700, 136, 1536, 128, BF16, BF16, {}),
    (wgmma(256, 2), 500, 264, 2048, 64, INT8, BF16, {"addend": True}),  # 2 and 4 parts: each finishes its share
    (wgmma(64, 4), 50, 1000, 4096, 32, INT8, FP16, {}),
    (wgmma(64, 4), 70, 136, 2048, 64, BF16, BF16, {"addend": True}),
    (wgmma(128, 2), 130, 264, 1152, None, INT8, BF16, {}),
    (narrow(16), 16, 200, 384, 64, INT8, FP16, {"bias": False}),  # K of an odd number of 128
    (narrow(16, 3, ctas=2), 13, 264, 1152, 128, INT8, BF16, {"addend": True}),
    (narrow(8, 2, ctas=2), 5, 136, 2048, 32, INT8, BF16, {"addend": True}),
    (narrow(16, ctas=2), 9, 1000, 2048, None, INT8, BF16, {"group": 256}),
    (narrow(16, 8, ctas=2), 16, 4096, 14336, 64, INT8, BF16, {}),
    (narrow(16), 16, 20000, 512, 64, INT8, BF16, {"addend": True}),  # more tiles than programs
    (None, (2, 3), 70, 192, 6, INT8, torch.float32, {"group": 64}),
    (None, 100, 130, 384, 48, BF16, BF16, {"addend": True}),
    (None, 3, 40, 192, 6, torch.float32, torch.float32, {"group": 192}),
]


@pytest.mark.parametrize(("config", "t", "n", "k", "rank", "operand", "dtype", "options"), ODD)
def test_odd_shapes_are_within_their_bound(config, t, n, k, rank, operand, dtype, options):
    args = random_args(t, n, k, rank, operand, dtype, **options)
    assert worst_twin_gemm(run(args, config), *args) <= 1


# t made in the product: config, t, n, k, rank, group of down, operand, dtype, options
DEFERRED = [
    (wgmma(16, ctas=3), 13, 200, 384, 64, 128, INT8, BF16, {"addend": True}),
    (wgmma(32, 4, ctas=2), 33, 136, 2048, 32, 256, INT8, FP16, {}),
    (wgmma(64, 2, ctas=2), 100, 264, 1152, 64, 384, INT8, BF16, {"group": 384}),
    (wgmma(128), 300, 264, 640, 128, 128, INT8, BF16, {"bias": False}),
    (wgmma(128, 8), 130, 264, 4096, 128, 512, INT8, BF16, {"addend": True}),
    (wgmma(256), 257, 1000, 384, 64, 128, INT8, FP16, {"addend": True}),
    (wgmma(256, 3), 700, 136, 1536, 128, 128, INT8, BF16, {}),
    (wgmma(256), 3000, 4096, 256, 64, 128, INT8, BF16, {}),
    (wgmma(16, 3, ctas=3), 13, 200, 2048, 128, 128, FP16, FP16, {"bias": False}),
    (wgmma(64, 2, ctas=2), 100, 264, 1152, 64, 128, BF16, BF16, {}),
    (wgmma(256), 700, 136, 1536, 64, 256, BF16, BF16, {"addend": True}),
    (wgmma(256, 2), 300, 264, 2048, 64, 128, INT8, BF16, {"addend": True}),
    (wgmma(64, 4), 100, 520, 4096, 64, 256, INT8, BF16, {}),
    (wgmma(128, 4), 130, 264, 2048, 64, 128, BF16, BF16, {}),
    (wgmma(128), 130, 264, 512, 64, 64, INT8, BF16, {}),  # groups of 64: t in a launch of its own
    (wgmma(8), 5, 264, 512, 64, 128, INT8, BF16, {}),
    (narrow(16), 13, 200, 384, 64, 128, INT8, BF16, {"addend": True}),
    (narrow(16, 3, ctas=2), 16, 264, 1152, 128, 384, INT8, FP16, {}),
    (narrow(8, 2), 5, 1000, 2048, 32, 256, INT8, BF16, {"addend": True}),
    (narrow(16, ctas=2), 16, 40000, 640, 64, 128, INT8, BF16, {"bias": False}),
    (narrow(16), 9, 264, 512, 64, 64, INT8, BF16, {}),  # groups of 64: t in a launch of its own
    (SKINNY, 9, 1000, 2048, 64, 128, FP16, FP16, {}),
    ({"kernel": "dense"}, 40, 264, 512, 32, 128, BF16, BF16, {}),
    (None, 33, 130, 384, 48, 192, INT8, torch.float32, {"group": 64}),
]


@pytest.mark.parametrize(("config", "t", "n", "k", "rank", "group", "operand", "dtype", "options"), DEFERRED)
def test_t_that_was_left_to_it_is_within_its_bound(config, t, n, k, rank, group, operand, dtype, options):
    args = list(random_args(t, n, k, rank, operand, dtype, **options))
    args[2] = torch.full_like(args[2], float("nan"))
    args += [*random_down(rank, k, group, dtype, "cuda"), 1]
    dense = config is not None and config["kernel"] == "dense"
    first = run(args, config)
    assert worst_twin_gemm(first, *args, dense=dense) <= 1
    for _ in range(50):
        assert torch.equal(kernel.launch(*args, config=config), first)


SPARE = [case for case in DEFERRED if case[0] is not None and case[0]["kernel"] in ("wgmma", "narrow")]


@pytest.mark.parametrize(("config", "t", "n", "k", "rank", "group", "operand", "dtype", "options"), SPARE)
def test_what_lies_behind_the_last_token_reaches_no_result(config, t, n, k, rank, group, operand, dtype, options):
    args = list(random_args(t, n, k, rank, operand, dtype, **options))
    args += [*random_down(rank, k, group, dtype, "cuda"), 1]
    spare = torch.full((512, k), 127 if operand == INT8 else float("nan"), dtype=operand, device="cuda")
    behind = torch.cat((args[0], spare))[:t]
    assert rows_in_storage(behind, 512) == -(-t // 512) * 512
    assert rows_in_storage(args[0].clone(), 512) == t
    assert torch.equal(run([behind, *args[1:]], config), run([args[0].clone(), *args[1:]], config))


@pytest.mark.parametrize(
    ("config", "t", "n", "k", "rank", "group"),
    [
        (wgmma(32, 4, ctas=2), 33, 136, 2048, 32, 256),
        (wgmma(256), 257, 1000, 384, 64, 128),
        (wgmma(256, 2), 300, 264, 2048, 64, 128),
        (narrow(16), 13, 200, 384, 64, 128),
        (narrow(16, 3, ctas=2), 16, 264, 1152, 128, 384),
        (wgmma(128), 130, 264, 512, 64, 64),  # groups of 64: t in a launch of its own
        (SKINNY, 9, 1000, 2048, 64, 128),
    ],
)
def test_t_is_made_of_the_eight_bits_beside_four(config, t, n, k, rank, group):
    args = list(random_args(t, n, k, rank, INT8, BF16))
    g = torch.Generator("cuda").manual_seed(t)
    args[0] = torch.randint(-8, 8, (t, k), generator=g, device="cuda", dtype=INT8)
    args[2] = torch.full_like(args[2], float("nan"))
    wide = torch.randint(-127, 128, (t, k), generator=g, device="cuda", dtype=INT8)
    args += [*random_down(rank, k, group, BF16, "cuda"), 1, wide, 7 / 127]
    first = run(args, config)
    assert worst_twin_gemm(first, *args) <= 1
    assert worst_twin_gemm(first, *args[:14]) > 1  # t of the four bits is another
    for _ in range(20):
        assert torch.equal(kernel.launch(*args, config=config), first)


@pytest.mark.parametrize(
    ("config", "t", "n", "k"),
    [
        (wgmma(16, ctas=2), 16, 28672, 4096),
        (wgmma(16, 2, ctas=2), 16, 28672, 4096),
        (wgmma(64, ctas=2), 64, 28672, 4096),
        (wgmma(64, 2), 64, 6144, 4096),
        (wgmma(64, 4), 64, 4096, 4096),
        (wgmma(256, 2), 512, 4096, 14336),
        (narrow(16, ctas=2), 16, 28672, 4096),
        (narrow(16, 4), 16, 4096, 14336),
        (narrow(16, 8, ctas=2), 16, 4096, 14336),
    ],
)
def test_t_is_handed_over_ten_thousand_times(config, t, n, k):
    """What went wrong with two programs on a multiprocessor did so about once in ten thousand launches."""
    args = [*random_args(t, n, k, 64, INT8, BF16), *random_down(64, k, 128, BF16, "cuda"), 1]
    first = run(args, config)
    replay, results = capture(lambda: [kernel.launch(*args, config=config) for _ in range(4)])
    for _ in range(100):
        for _ in range(100):
            replay()
        assert all(torch.equal(y, first) for y in results)


@pytest.mark.parametrize("operand", [INT8, BF16])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_t_is_made_beside_the_product_of_layer_shapes(n, k, operand):
    for t in (64, 256, 500, 2048):
        args = [*random_args(t, n, k, 64, operand, BF16, seed=t), *random_down(64, k, 128, BF16, "cuda"), 64]
        dense = kernel.describe(*args) == "dense"
        worst = worst_twin_gemm(run(args), *args, dense=dense)
        assert worst <= 1, f"T={t}: error is {worst:.3g} times its bound"


@pytest.mark.parametrize("operand", [INT8, BF16])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_layer_shapes_are_within_their_bound(n, k, operand):
    for t in (1, 2, 3, 16, 17, 64, 100, 256, 512, 2048):
        args = random_args(t, n, k, 64, operand, BF16, seed=t)
        dense = kernel.describe(*args) == "dense"
        worst = worst_twin_gemm(run(args), *args, dense=dense)
        assert worst <= 1, f"T={t}: error is {worst:.3g} times its bound"


def test_a_70b_shape():
    for t in (1, 16, 512):
        args = random_args(t, 57344, 8192, 64, INT8, BF16)
        assert worst_twin_gemm(run(args), *args) <= 1


def test_one_wrong_weight_is_seen():
    args = random_args(300, 512, 4096, 64, INT8, BF16)
    y = run(args)
    for i in (3, 6):  # residual, up
        wrong = list(args)
        wrong[i] = args[i].clone()
        wrong[i][:, :8] ^= 0x88
        assert worst_twin_gemm(y, *wrong) > 1


def test_no_tokens():
    assert run(random_args(0, 512, 1024, 64, INT8, BF16)).shape == (0, 512)


@pytest.mark.parametrize("operand", [INT8, BF16])
@pytest.mark.parametrize("t", [1, 5, 16, 60, 130, 512])
def test_a_thousand_launches_give_the_same_bits(t, operand):
    args = random_args(t, 4096, 4096, 64, operand, BF16)
    first = run(args)
    if t > 100:
        args = (*args, *random_down(64, 4096, 128, BF16, "cuda"), 1)
        first = run(args)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (kernel.launch(*args).view(torch.int16) != first.view(torch.int16)).sum()
    assert different.item() == 0


@pytest.mark.parametrize(("bm", "splits"), [(16, 8), (16, 6), (8, 8), (16, 4)])
def test_a_buffer_is_read_before_it_is_filled_again(bm, splits):
    """Weights that the L2 cache holds come faster than two programs on a multiprocessor read them. Without a fence a
    warp then read, in every launch, what had been copied over its own weights."""
    args = random_args(bm, 4096, 14336, None, INT8, BF16)
    expected = run(args, narrow(bm))
    for _ in range(300):
        assert torch.equal(kernel.launch(*args, config=narrow(bm, splits, ctas=2)), expected)


def test_two_streams_do_not_disturb_each_other():
    cases = [random_args(t, 4096, 4096, 64, INT8, BF16, seed=t) for t in (16, 48)]
    expected = [kernel.launch(*args) for args in cases]
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], [[], []]
    torch.cuda.synchronize()
    for _ in range(100):
        for i in (0, 1):
            with torch.cuda.stream(streams[i]):
                results[i].append(kernel.launch(*cases[i]))
    torch.cuda.synchronize()
    for i in (0, 1):
        assert all(torch.equal(y, expected[i]) for y in results[i])


@pytest.mark.parametrize("t", [1, 16, 300])
def test_prologue_and_gemm_in_a_graph_equal_eager(t):
    from tqcompile.kernels import prologue

    args = random_args(t, 4096, 4096, 64, INT8, BF16)
    down = random_down(64, 4096, 128, BF16, "cuda")
    x = torch.randn(t, 4096, device="cuda", dtype=BF16)

    def both():
        given = (x, None, None, None, None, *down, "none", 0.0, 8, 0.0, True, 33)
        operand, scale, low_rank, *_ = prologue.launch(*given)
        return kernel.launch(operand, scale, low_rank, *args[3:], *down, 33), operand, scale, low_rank

    for _ in range(2):
        both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = both()[0]
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        eager, operand, scale, low_rank = both()
        assert torch.equal(y, eager)
        assert worst_twin_gemm(y, operand, scale, low_rank, *args[3:], *down, 33) <= 1


def test_captured_launches_that_find_no_counters_clear_their_own_and_say_so(monkeypatch, caplog):
    args = random_args(16, 4096, 4096, 64, INT8, BF16)
    expected = run(args, narrow(16, 4))
    monkeypatch.setattr(split_counters, "_ARENA", 64)
    monkeypatch.setattr(split_counters, "_arenas", {})
    assert torch.equal(run(args, narrow(16, 4)), expected)
    for _ in range(2):
        replay, found = capture(lambda: kernel.launch(*args, config=narrow(16, 4)))
        for _ in range(3):
            found.fill_(0)
            replay()
            assert torch.equal(found, expected)
    assert [record.message.split(";")[0] for record in caplog.records if record.name == "tqcompile"] == [
        "the 64 counters of captured launches are used up"
    ]
