import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from capture_graphs import capture
from random_components import random_components
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from tqcompile import backend, recipes
from tqcompile.config import Config
from tqcompile.errors import ConfigError
from tqcompile.methods import recipe
from tqcompile.modules import TwinLinear
from tqcompile.passes.buffers import attach_buffer
from tqcompile.passes.find_linears import is_linear

ROOT = Path(__file__).parents[1]
SMALL = {"rank": 8, "group_size": 32}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    backend.reports.clear()


def tiny(name: str, layers: int = 2) -> nn.Module:
    import transformers

    sizes = {
        "vocab_size": 97,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    if name == "Bert":
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    else:
        config = getattr(transformers, f"{name}Config")(**sizes, num_key_value_heads=2, head_dim=32)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    # The usual 0.02 makes logits so flat that equal tokens would say little.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def swapped(model: nn.Module, **settings) -> nn.Module:
    """The model with every linear but lm_head replaced, from what the backend quantized."""
    twin, config = copy.deepcopy(model), Config(**settings)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            quantized = recipes.remembered(layer.weight, layer.bias, config)
            quantized = quantized or recipe.quantize_data_free(layer.weight, layer.bias, config)
            recipes.remember(layer.weight, layer.bias, config, quantized)
            twin.set_submodule(name, TwinLinear.from_quantized(quantized))
    return twin


def first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


def ops_by_name(report: backend.GraphReport, op: str) -> int:
    return sum(op in name for name in report.lowered)


@pytest.mark.parametrize(
    ("name", "layers", "inner", "linears", "quantizations"),
    [
        ("Qwen3", 1, "inductor", 7, 4),
        ("Qwen3", 2, "eager", 14, 8),
        ("Llama", 2, "aot_eager", 14, 8),
        # query, key and value; output; intermediate; its output; and one pooler.
        ("Bert", 2, "aot_eager", 13, 9),
    ],
)
def test_compiled_model_is_the_module_swapped_model(name, layers, inner, linears, quantizations):
    model = tiny(name, layers)
    ids = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        got = first(torch.compile(model, backend="twinquant", fullgraph=True, options={"inner": inner})(ids))
        want = first(swapped(model)(ids))
    # The same ops on the same integers; other kernels may sum in another order, and move a rounding to 8 bit.
    assert (got - want).norm() <= (0 if inner == "eager" else 1e-3) * want.norm()
    with torch.no_grad():
        assert (want - first(model(ids))).norm() > 1e-2 * want.norm()
    (report,) = backend.reports
    assert set(report.quantized.values()) == {"data-free"}
    assert len(report.quantized) == linears
    assert ops_by_name(report, "twin_linear") == linears
    assert ops_by_name(report, "quantize_activation") == quantizations
    assert report.left == ({} if name == "Bert" else {"lm_head": "ignored by 'lm_head'"})


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_quantized_model_is_not_quantized_again(inner):
    twin = swapped(tiny("Qwen3")).requires_grad_(False)
    ids = torch.randint(0, 97, (2, 9))
    want = first(twin(ids))
    got = first(torch.compile(twin, backend="twinquant", options={"inner": inner})(ids))
    assert (got - want).norm() <= 1e-3 * want.norm()
    (report,) = backend.reports
    assert report.quantized == {}
    assert report.left == {"lm_head": "the model was quantized before it was compiled"}
    # 7 quantizations a layer become 4: q/k/v, o, gate/up, down.
    assert len(report.lowered) == 2 * (7 + 4)
    assert report.modified["share_activation_quant"]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("quantized_before", [False, True])
def test_generate_compiles_prefill_and_decode_once(cache, quantized_before, monkeypatch):
    model = tiny("Qwen3")
    eager = swapped(model)
    if quantized_before:
        model = copy.deepcopy(eager).requires_grad_(False)
    calls = []

    def counting(gm, example_inputs, **options):
        calls.append(len(example_inputs))
        return backend.twinquant(gm, example_inputs, **options)

    monkeypatch.setattr(recipe, "quantize_data_free", lambda *args: pytest.fail("quantized twice"))
    model.compile(backend=counting, dynamic=True, options={"inner": "eager"})
    arguments = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    for length in (9, 13):
        ids = torch.randint(0, 97, (2, length))
        got = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        assert torch.equal(got, eager.generate(ids, attention_mask=torch.ones_like(ids), **arguments))
        assert got.shape == (2, length + 12)
        assert len(set(got[:, length:].flatten().tolist())) > 3
    assert len(calls) == 2
    assert counters["stats"]["unique_graphs"] == 2


def test_generate_through_inductor():
    model = tiny("Qwen3", layers=1)
    eager = swapped(model)
    model.compile(backend="twinquant", dynamic=True, mode="default")
    # With a DynamicCache, Inductor (plain Inductor too) compiles decode once more: it lays the cache out anew.
    arguments = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    for length in (9, 13):
        ids = torch.randint(0, 97, (2, length))
        got = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        assert torch.equal(got, eager.generate(ids, attention_mask=torch.ones_like(ids), **arguments))
    assert len(backend.reports) == 2


def test_components_are_made_once_for_all_shapes(monkeypatch, caplog):
    made = []
    real = recipe.quantize_data_free
    monkeypatch.setattr(recipe, "quantize_data_free", lambda *args: made.append(1) or real(*args))
    layer = nn.Linear(64, 40)
    compiled = torch.compile(layer, backend="twinquant", dynamic=False, options={"inner": "eager", **SMALL})
    with torch.inference_mode(), caplog.at_level(logging.WARNING, logger="tqcompile"):
        for tokens in (3, 4):
            compiled(torch.randn(tokens, 64))
    with torch.no_grad():
        compiled(torch.randn(5, 64))
    assert len(backend.reports) == 3
    assert made == [1]
    assert sum("no calibration data" in record.getMessage() for record in caplog.records) == 1
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.compile(layer, backend="twinquant", options={"inner": "eager", **SMALL})(torch.randn(6, 64))
    assert made == [1, 1]


def test_attached_components_win():
    layer = nn.Linear(64, 24)
    quantized = random_components(seed=7)
    recipes.attach(layer.weight, quantized)
    x = torch.randn(5, 64)
    with torch.no_grad():
        got = torch.compile(layer, backend="twinquant", options={"inner": "eager"})(x)
        assert torch.equal(got, TwinLinear.from_quantized(quantized)(x))
    assert list(backend.reports[-1].quantized.values()) == ["attached"]


def test_recipes_forget_a_weight_that_changed_and_one_that_is_gone(caplog):
    weight = nn.Parameter(torch.randn(24, 64))
    recipes.attach(weight, random_components())
    with pytest.raises(ConfigError, match=r"\(24, 64\).*\(24, 96\)"):
        recipes.attach(nn.Parameter(torch.randn(24, 96)), random_components())
    assert recipes.lookup(weight) is not None
    with torch.no_grad():
        weight.add_(1)
    with caplog.at_level(logging.WARNING, logger="tqcompile"):
        assert recipes.lookup(weight) is None
        assert recipes.lookup(weight) is None
    assert len(caplog.records) == 1
    count = len(recipes._attached)
    recipes.attach(weight, random_components())
    assert len(recipes._attached) == count + 1
    del weight
    assert len(recipes._attached) == count


def test_one_weight_with_two_biases_is_two_linears():
    weight, biases = nn.Parameter(torch.randn(24, 64)), [nn.Parameter(torch.randn(24)) for _ in range(2)]
    for i, bias in enumerate(biases):
        recipes.remember(weight, bias, Config(), random_components(seed=i))
    seen = [recipes.remembered(weight, bias, Config()).tensors["bias"] for bias in biases]
    assert not torch.equal(*seen)
    assert recipes.remembered(weight, None, Config()) is None
    assert recipes.remembered(weight, biases[0], Config(rank=64)) is None


def test_layers_that_share_code_do_not_share_components():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 24)

        def forward(self, x):
            return self.linear(x)

    layers = [Block() for _ in range(3)]
    x = torch.randn(5, 64)
    for i, layer in enumerate(layers):
        recipes.attach(layer.linear.weight, random_components(seed=i))
        layer.compile(backend="twinquant", options={"inner": "eager"})
    with torch.no_grad():
        for _ in range(2):
            for i, layer in enumerate(layers):
                assert torch.equal(layer(x), TwinLinear.from_quantized(random_components(seed=i))(x))
    assert len(backend.reports) == 3


def test_shapes_that_do_not_fit_are_left_and_named_once(caplog):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.narrow = nn.Linear(64, 48), nn.Linear(48, 64)
            self.low, self.wide = nn.Linear(64, 7), nn.Linear(64, 24, dtype=torch.float64)
            self.weight = nn.Parameter(torch.randn(24, 64))

        def forward(self, x, given):
            x = self.narrow(self.good(x))
            computed = nn.functional.linear(x, self.weight * 2) + nn.functional.linear(x, given)
            return self.low(x), self.wide(x.double()), computed

    model, x, given = Odd(), torch.randn(3, 64), torch.randn(24, 64)
    compiled = torch.compile(model, backend="twinquant", dynamic=False, options={"inner": "eager", **SMALL})
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="tqcompile"):
        results = compiled(x, given)
        compiled(torch.randn(4, 64), given)
        model.good = TwinLinear.from_quantized(recipes.remembered(model.good.weight, model.good.bias, Config(**SMALL)))
        for got, want in zip(results, model(x, given), strict=True):
            torch.testing.assert_close(got, want)
    report = backend.reports[0]
    assert list(report.quantized) == ["good"]
    assert report.left["narrow"] == "group_size 32 does not divide its 48 input features"
    assert report.left["low"] == "rank 8 is not below the smaller of its dimensions, 7 and 64"
    assert "float64" in report.left["wide"]
    assert sum("not a parameter" in reason for reason in report.left.values()) == 2
    for name in ("narrow", "low", "wide"):
        assert sum(f"{name} stays as it is" in record.getMessage() for record in caplog.records) == 1


def test_ignore_takes_module_names_and_patterns():
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64))
    options = {"inner": "eager", **SMALL, "ignore": ["1.0", "re:2"]}
    with torch.no_grad():
        torch.compile(model, backend="twinquant", options=options)(torch.randn(3, 64))
    (report,) = backend.reports
    assert list(report.quantized) == ["0"]
    assert report.left == {"1.0": "ignored by '1.0'", "2": "ignored by 're:2'"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"options": {"rnak": 8}},
            "unknown option 'rnak'; known options: quantize, lower, inner, inductor, scheme, rank",
        ),
        ({"options": {"lower": "cuda"}}, "lower must be True, False or None, got 'cuda'"),
        ({"options": {"inner": "tvm"}}, "inner must be one of inductor, aot_eager, eager"),
        ({"options": {"rank": 7}}, "rank must be even"),
        ({"options": {"scheme": "twin-w3a3"}}, "known schemes"),
        ({"options": {"inductor": ["max_autotune"]}}, "must be a dict"),
        ({"options": {"inner": "eager"}, "mode": "default"}, "are for Inductor"),
        ({"options": {"inner": "eager", "inductor": {"cpp_wrapper": True}}}, "are for Inductor"),
        ({"mode": "fastest"}, "unknown mode 'fastest'; known modes: default"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_quantized(arguments, message, monkeypatch):
    monkeypatch.setattr(recipe, "quantize_data_free", lambda *args: pytest.fail("too late"))
    gm, inputs = capture(nn.Linear(64, 24), torch.randn(3, 64), spelling="dynamo")
    with pytest.raises(ConfigError, match=message):
        backend.twinquant(gm, list(inputs), **arguments)


def test_unknown_option_reaches_the_user_of_torch_compile():
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="unknown option 'rnak'"):
        torch.compile(nn.Linear(64, 24), backend="twinquant", options={"rnak": 8})(torch.randn(3, 64))


@pytest.mark.parametrize("arguments", [{"mode": "default"}, {"mode": "max-autotune-no-cudagraphs"}, {}])
def test_modes_become_inductor_settings(arguments, monkeypatch):
    from torch._inductor import compile_fx

    seen = []

    def keep(gm, example_inputs, config_patches=None):
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", keep)
    with torch.no_grad():
        torch.compile(nn.Linear(128, 64), backend="twinquant", **arguments)(torch.randn(3, 128))
    expected = torch._inductor.list_mode_options().get(arguments.get("mode", "default"))
    assert seen == [expected]


def test_gradients_are_refused_before_anything_is_quantized(monkeypatch):
    real = recipe.quantize_data_free
    monkeypatch.setattr(recipe, "quantize_data_free", lambda *args: pytest.fail("too late"))
    model, x = nn.Sequential(nn.Linear(64, 24)), torch.randn(3, 64)
    compiled = torch.compile(model, backend="twinquant", options={"inner": "aot_eager", **SMALL})
    with pytest.raises(BackendCompilerFailed, match=r"0 would need a gradient.*requires_grad_\(False\)"):
        compiled(x)
    twin = TwinLinear.from_quantized(random_components())
    with pytest.raises(BackendCompilerFailed, match="would need a gradient"):
        torch.compile(twin, backend="twinquant", options={"inner": "eager"})(x.clone().requires_grad_())
    monkeypatch.setattr(recipe, "quantize_data_free", real)
    with torch.no_grad():
        inside = compiled(x)

    @torch.compile(backend="twinquant", options={"inner": "aot_eager", **SMALL})
    def without(x):
        with torch.no_grad():
            return model(x)

    assert torch.equal(without(x), inside)
    model.requires_grad_(False)
    assert torch.equal(compiled(x), inside)


def test_attached_buffer_passes_aot_autograd_and_inductor():
    """Pins a private table of dynamo: ``_param_name_to_source`` must list every buffer that a backend adds."""

    def add_buffer(attach):
        def compiler(gm, example_inputs):
            (node,) = [node for node in gm.graph.nodes if is_linear(node)]
            attach(gm, "tq_offset", torch.arange(5.0))
            with gm.graph.inserting_after(node):
                value = gm.graph.get_attr("tq_offset")
            with gm.graph.inserting_after(value):
                total = gm.graph.call_function(torch.add, (node, value))
            node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
            gm.recompile()
            assert hasattr(gm, "_param_name_to_source")
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(gm, example_inputs)

        return compiler

    layer, x = nn.Linear(3, 5), torch.randn(4, 3)
    with torch.no_grad():
        got = torch.compile(layer, backend=add_buffer(attach_buffer))(x)
        torch.testing.assert_close(got, layer(x) + torch.arange(5.0))
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match="tq_offset not found in param_name_to_source"):
            torch.compile(layer, backend=add_buffer(nn.Module.register_buffer))(x)


def test_entry_point_needs_no_import(tmp_path):
    info = tmp_path / "tqcompile-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tqcompile\nVersion: 0\n")
    project = (ROOT / "pyproject.toml").read_text()
    section, _, rest = project.partition("[project.entry-points.torch_dynamo_backends]")[2].partition("\n\n")
    name, target = section.strip().replace('"', "").split(" = ")
    assert rest
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{name} = {target}\n")
    program = """
import sys, torch
layer, x = torch.nn.Linear(128, 64), torch.randn(3, 128)
compiled = torch.compile(layer, backend="twinquant", options={"inner": "eager"})
with torch.no_grad():
    y = compiled(x)
    error = (y - layer(x)).norm() / layer(x).norm()
assert 0 < error < 0.2, error
assert "twinquant" in torch._dynamo.list_backends()
from tqcompile.backend import reports
assert list(reports[0].quantized.values()) == ["data-free"], reports
assert not {"transformers", "onnx", "tqcompile.kernels"} & set(sys.modules)
print("ran")
"""
    assert "import tqcompile" not in program
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "ran", result.stderr
