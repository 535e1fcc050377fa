"""The benchmark scripts run, their gates catch a wrong result, and both sides do the same work; on a CPU, tiny."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gemm_bounds import grid_scales, worst_plain_prologue, worst_twin_gemm

from tqcompile import ops
from tqcompile.modules import TwinLinear
from tqcompile.ops.packing import dequantize_int4, integer_scales

ROOT = Path(__file__).parents[1]
TINY = [
    "--geometry=tiny",
    "--device=cpu",
    "--inner=eager",
    "--rank=16",
    "--group-size=64",
    "--replays=2",
    "--jobs=1",
    "--layers=1",
]


def script(name: str):
    """A benchmark as a module; not through sys.path, where kernels.py would shadow a package of that name."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def end_to_end():
    return script("end_to_end")


@pytest.fixture
def options(end_to_end):
    return end_to_end.parse(TINY)


def test_end_to_end_measures_both_sides_of_every_case(end_to_end, tmp_path, capsys):
    rows = end_to_end.main([*TINY, "--models", "qwen3-8b", "--json", str(tmp_path / "e.json")])
    cases = [case.name for case in end_to_end.TINY_CASES]
    assert [(row["side"], row["case"]) for row in rows] == [(s, c) for s in ("bf16", "twin") for c in cases]
    for row in rows:
        assert row["ms"] > 0
    for row in rows[len(cases) :]:
        assert 0 < row["error"] <= end_to_end.GATE * row["bf16_error"]
        here = "reference: there is no kernel for device cpu"  # four sites in the one layer
        assert row["implementations"] == {f"prologue: {here}": 4, f"twin_gemm: {here}": 4}
    stored = json.loads((tmp_path / "e.json").read_text())
    assert stored["rows"] == rows
    out = capsys.readouterr().out
    for case in cases:
        assert f"qwen3-8b    {case}" in out


def test_as_a_command_the_sides_run_in_processes_of_their_own(tmp_path):
    path = tmp_path / "e.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "end_to_end.py"), *TINY, "--jobs=2", "--models=llama-3-8b"]
    command += ["--cases=decode-b1-24", "--json", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    assert sorted(row["side"] for row in json.loads(path.read_text())["rows"]) == ["bf16", "twin"]
    assert "llama-3-8b  decode-b1-24" in found.stdout


def test_a_killed_run_keeps_the_cases_before_it(end_to_end, tmp_path, monkeypatch):
    timed, path = end_to_end.timed, tmp_path / "e.json"

    def killed(model, case, options):
        if case.batch > 1:
            raise KeyboardInterrupt
        return timed(model, case, options)

    monkeypatch.setattr(end_to_end, "timed", killed)
    with pytest.raises(KeyboardInterrupt):
        end_to_end.main([*TINY, "--models=llama-3-8b", "--cases=decode-b1-24,decode-b2-40", "--json", str(path)])
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["decode-b1-24"]


def test_a_wrong_compiled_step_prints_no_time(end_to_end, monkeypatch, capsys, tmp_path):
    compile_side = end_to_end.compile_side

    def tampered(model, side, options):  # after the references were computed
        if side == "twin":
            model.model.layers[0].self_attn.o_proj.residual.weight_scale.mul_(1.25)
        compile_side(model, side, options)

    monkeypatch.setattr(end_to_end, "compile_side", tampered)
    path = tmp_path / "e.json"
    with pytest.raises(SystemExit, match=r"twin prefill-2x24: Wrong: the compiled step is off by"):
        end_to_end.main([*TINY, "--models=llama-3-8b", "--cases=prefill-2x24", "--json", str(path)])
    bf16, twin = json.loads(path.read_text())["rows"]
    assert bf16["ms"] > 0  # the other side is kept
    assert set(twin) == {"model", "side", "case", "failed"}
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("llama-3-8b  prefill"))
    assert line.split()[3:5] == ["-", "-"]


@pytest.mark.parametrize("head", ["w8a16", "w4a16"])
def test_the_head_is_rounded_on_the_twin_side(end_to_end, options, head):
    sizes = []
    for choice in ("keep", head):
        model = end_to_end.build("llama-3-8b", options)
        end_to_end.quantize(model, argparse.Namespace(**{**vars(options), "lm_head": choice}))
        sizes.append(end_to_end.weight_bytes(model))
    values = 257 * 128
    assert sizes[0] - sizes[1] == values * 2 - values * int(head[1]) // 8 - values // 64 * 2


def test_an_unknown_case_is_named(end_to_end):
    with pytest.raises(SystemExit, match=r"unknown case 'decode'; known: decode-b1-24"):
        end_to_end.main([*TINY, "--cases", "decode"])


def test_the_random_model_has_the_form_of_a_quantized_one(end_to_end, options):
    """Grid scales exact in bfloat16; one transform and one down-projection a site; weights of the usual spread."""
    model = end_to_end.build("llama-3-8b", options)
    end_to_end.quantize(model, options)
    layer = model.model.layers[0]
    q, k, v = (layer.get_submodule(f"self_attn.{name}_proj") for name in "qkv")
    for one, other in ((q, k), (q, v), (layer.mlp.gate_proj, layer.mlp.up_proj)):
        assert torch.equal(one.down.weight_packed, other.down.weight_packed)
        assert torch.equal(one.down.weight_scale, other.down.weight_scale)
        assert one.down.weight_packed is not other.down.weight_packed
        assert torch.equal(one.transform.rotation, other.transform.rotation)
    assert not torch.equal(q.residual.weight_packed[:64], k.residual.weight_packed[:64])
    twins = [m for m in model.modules() if isinstance(m, TwinLinear)]
    assert len(twins) == 7
    for twin in twins:
        scale = twin.residual.weight_scale.double()
        significand = torch.frexp(scale)[0] * 256
        assert torch.equal(significand, significand.round())
        # c * 4 .. c * 16 for some c: the row's smallest scale is one of the multiples.
        ratio = scale[:, None] / scale.amin(1)[:, None, None] * torch.arange(4, 17)[:, None]
        assert ((ratio - ratio.round()).abs().amax(2) < 1e-9).any(1).all()
        spread = dequantize_int4(twin.residual.weight_packed, twin.residual.weight_scale).std()
        assert 0.01 < spread < 0.04


def test_a_decode_step_sees_the_whole_cache_and_writes_its_last_slot(end_to_end, options):
    model = end_to_end.build("qwen3-8b", options)
    case = end_to_end.Case(True, 2, 24)
    step = end_to_end.Step(model.config, case, "cpu")
    before = [layer.keys.clone() for layer in step.cache.layers]
    with torch.no_grad():
        step.logits(model)
        first = step.cache.layers[0]
        assert torch.equal(first.keys[:, :, :-1], before[0][:, :, :-1])
        assert not torch.equal(first.keys[:, :, -1], before[0][:, :, -1])
        plain = argparse.Namespace(**{**vars(options), "attention": "sdpa"})
        masked = end_to_end.build("qwen3-8b", plain)
        masked.load_state_dict(model.state_dict())
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, keys in enumerate(before):
            values = end_to_end.Step(model.config, case, "cpu").cache.layers[index].values
            cache.update(keys[:, :, :-1], values[:, :, :-1], index)
        expected = masked(input_ids=step.ids, past_key_values=cache, use_cache=True).logits
        got = end_to_end.Step(model.config, case, "cpu").logits(model)
    assert end_to_end.relative(got, expected) < 2e-2  # bf16, other kernels


def test_prefill_is_causal(end_to_end, options):
    model = end_to_end.build("llama-3-8b", options)
    step = end_to_end.Step(model.config, end_to_end.Case(False, 2, 24), "cpu")
    with torch.no_grad():
        got = step.logits(model)
        plain = argparse.Namespace(**{**vars(options), "attention": "sdpa"})
        masked = end_to_end.build("llama-3-8b", plain)
        expected = masked(input_ids=step.ids, use_cache=False).logits[:, -1:]
    assert got.shape == expected.shape
    assert end_to_end.relative(got, expected) < 2e-2


# ------------------------------------------------------------------------------------------------------------ kernels


@pytest.fixture(scope="module")
def kernels():
    return script("kernels")


def test_kernels_measures_every_form(kernels, tmp_path, capsys):
    arguments = ["--device=cpu", "--shapes=70x384", "--tokens=1,19", "--rank=16", "--rotation"]
    rows = kernels.main([*arguments, "--json", str(tmp_path / "k.json")])
    assert [row["T"] for row in rows] == [1, 19]
    for row in rows:
        assert set(row["error_over_bound"]) == set(kernels.ACT_BITS)
        for found in row["error_over_bound"].values():
            assert set(found) == {"operand", "t", "y"}
            assert 0 < max(found.values()) <= 1
        assert {"bf16", "w4a8 prologue", "w4a8 gemm", "w4a8"} <= set(row["us"])
        assert row["ratio_to_bf16"]["w4a4"] == row["us"]["bf16"] / row["us"]["w4a4"]
    assert json.loads((tmp_path / "k.json").read_text())["rows"] == rows
    assert "70x384" in capsys.readouterr().out


def test_kernels_prints_no_time_of_a_wrong_kernel(kernels, monkeypatch, capsys):
    definition = ops.twin_gemm_reference

    def wrong(*args):
        y = definition(*args)
        y[-1, -1] *= 1.02
        return y

    monkeypatch.setattr(ops, "twin_gemm_reference", wrong)
    with pytest.raises(SystemExit, match=r"70x384 T=3 w4a8: an error exceeds its bound"):
        kernels.main(["--device=cpu", "--shapes=70x384", "--tokens=3", "--rank=16"])
    assert capsys.readouterr().out == ""


def test_kernels_measures_a_head(kernels):
    row = kernels.main(["--device=cpu", "--shapes=64x128", "--tokens=2", "--rank=8", "--forms=w4a8", "--head"])[-1]
    assert row["layer"] == "lm_head"
    assert 0 < row["error_over_bound"]["w8a16"]["y"] <= 1
    assert row["ratio_to_bf16"]["w8a16"] == row["us"]["bf16"] / row["us"]["w8a16"]


def test_kernels_leaves_out_what_no_kernel_serves_and_says_so(kernels, monkeypatch):
    class Missing(kernels.Kernel):
        def __init__(self, op, device):
            super().__init__(op, device)
            if op == "twin_gemm":
                self.unsupported = lambda *args: "operands must be int8" if args[0].dtype != torch.int8 else None

    monkeypatch.setattr(kernels, "Kernel", Missing)
    (row,) = kernels.main(["--device=cpu", "--shapes=64x128", "--tokens=2", "--rank=8"])
    assert row["left"] == {"w4a16": "twin_gemm: operands must be int8"}
    assert "w4a16" not in row["us"]
    assert "w4a8" in row["us"]


def test_grid_scales_are_exact_and_found_again():
    scale, unit = grid_scales(33, 7, 0.02, torch.Generator().manual_seed(0))
    m = scale.double() / unit.double()[:, None]
    assert torch.equal(m, m.round())
    assert m.min() >= 1
    assert m.max() <= 16
    c, multiples = integer_scales(scale)
    assert torch.equal(c.double()[:, None] * multiples.double(), scale.double())


@pytest.mark.parametrize("act_bits", [8, 4, 16])
@pytest.mark.parametrize("rank", [0, 10])
def test_the_bounds_hold_for_the_definitions_and_catch_what_is_left_out(kernels, act_bits, rank):
    weights = kernels.random_weights(37, 256, rank, True, "cpu")
    form = next(name for name, bits in kernels.ACT_BITS.items() if bits == act_bits)
    definitions = {op: kernels.Kernel(op, "cpu") for op in ("prologue", "twin_gemm")}
    ours = kernels.Ours(form, (None, None), definitions, 37, 256)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(21, 256, generator=g).bfloat16()
    operands = ours.prologue(weights, x)
    args = list(ours.gemm_args(weights, operands))
    args[8], args[9] = torch.randn(37, generator=g).bfloat16(), torch.randn(21, 37, generator=g).bfloat16()
    y = ops.twin_gemm_reference(*args)
    assert worst_twin_gemm(y, *args) <= 1
    for index in (2, 8, 9) if rank else (8, 9):  # t, bias, addend
        without = list(args)
        without[index] = None
        without[6:8] = [None, None] if index == 2 else without[6:8]
        assert worst_twin_gemm(ops.twin_gemm_reference(*without), *args) > 1
    given = ours.prologue_args(weights, x)
    found = worst_plain_prologue(operands, x, *given[3:7], act_bits, ours.ratio)
    assert max(found.values()) <= 1
    shifted = (operands[0].roll(1, -1), *operands[1:])
    assert max(worst_plain_prologue(shifted, x, *given[3:7], act_bits, ours.ratio).values()) > 1
    if rank:
        off = (*operands[:2], operands[2] * 1.02, operands[3])
        assert worst_plain_prologue(off, x, *given[3:7], act_bits, ours.ratio)["t"] > 1


@pytest.mark.parametrize("act_bits", [8, 4, 16])
def test_the_bound_holds_where_t_is_left_to_the_product(kernels, act_bits):
    weights = kernels.random_weights(37, 256, 10, True, "cpu")
    definitions = {op: kernels.Kernel(op, "cpu") for op in ("prologue", "twin_gemm")}
    form = next(name for name, bits in kernels.ACT_BITS.items() if bits == act_bits)
    ours = kernels.Ours(form, (None, None), definitions, 37, 256)
    assert ours.defer_from == 33
    for t in (33, 32):
        x = torch.randn(t, 256, generator=torch.Generator().manual_seed(t)).bfloat16()
        operands = ours.prologue(weights, x)
        assert operands[2].isnan().all() == (t == 33)
        args = list(ours.gemm_args(weights, operands))
        y = ops.twin_gemm_reference(*args)
        assert worst_twin_gemm(y, *args) <= 1
        assert max(ours.errors(weights, x).values()) <= 1
    args[13] = 32  # now t is made of down
    args[11] = weights[5] ^ 0x80
    assert worst_twin_gemm(y, *args) > 1


def test_mixed_gives_the_budget_the_average_of_the_uniform_model(monkeypatch, tmp_path, capsys):
    accuracy = script("accuracy")
    monkeypatch.setitem(sys.modules, "accuracy", accuracy)
    mixed, asked = script("mixed"), []

    def run_all(runs, args):
        asked.append(runs)
        return {r.key(): {"bits": 3.25, "perplexity": 7.5 if "bits_budget" in dict(r.settings) else 8.0} for r in runs}

    monkeypatch.setattr(accuracy, "run_all", run_all)
    monkeypatch.setattr(sys, "argv", ["mixed.py", "--schemes", "gptq-w3a16,twin-w4a8", "--seeds", "0,1"])
    mixed.main()
    uniform, chosen = asked
    assert [run.scheme for run in uniform] == ["fp32", "gptq-w3a16", "gptq-w3a16", "twin-w4a8", "twin-w4a8"]
    assert [(run.scheme, run.seed) for run in chosen] == [(run.scheme, run.seed) for run in uniform[1:]]
    assert all(dict(run.settings) == {"steps": 0, "tune": 0, "bits_budget": 3.25} for run in chosen)
    assert "| gptq-w3a16 | 1 | 3.250 | 8.0000 | 3.250 | 7.5000 |" in capsys.readouterr().out


def test_stream_measures_its_peak_and_compares_a_killed_run(tmp_path):
    small = ["--layers=2", "--vocabulary=2048", "--hidden=256", "--intermediate=256", "--heads=4", "--kv-heads=2"]
    path = tmp_path / "s.json"
    arguments = [*small, "--scheme=rtn-w4a16", "--kills=1", "--folder", str(tmp_path), "--json", str(path)]
    result = script("stream").main(arguments)
    assert result == json.loads(path.read_text())
    matrices = 2 * 2048 * 256 + 2 * 256 * (256 + 128 + 128 + 256 + 3 * 256)
    assert result["weight_bytes"] == 2 * (matrices + (2 * 2 + 1) * 256)
    assert result["whole"]["layers_quantized"] == {"rtn-w4a16": 14}
    assert result["whole"]["vm_hwm_bytes"] > 1e8
    assert len(result["kills_at"]) <= 1
    assert result["equal"] is True
    assert result["tensors"] > 14
    assert [file.name for file in tmp_path.iterdir()] == ["s.json"]
