"""compile and attach_recipe on tiny random models: every method, every refusal, and nothing half done."""

import copy

import pytest
import torch
from tiny_models import SETTINGS, as_bfloat16, assert_unchanged, logits, snapshot, tiny, tokens
from torch import nn

import tqcompile
from tqcompile import recipes
from tqcompile.config import DEFAULT_IGNORE, METHODS, Config
from tqcompile.errors import CalibrationError, ConfigError, ModelError, NumericError
from tqcompile.methods import select
from tqcompile.modules import TwinLinear

NAMES = {"Qwen3": 14, "Llama": 14, "Qwen2": 14, "Bert": 14}


def quantize(model, data=None, **changes):
    return tqcompile.compile(model, tokens() if data is None else data, **{**SETTINGS, **changes})


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_architecture(name, method):
    model = tiny(name).train()
    before = logits(model.eval())
    model.train()
    # BERT's classifier has two outputs: too few for a low-rank component.
    left = ["lm_head"] if name != "Bert" else ["classifier"] if method in ("twin", "svdquant") else []
    expected = [n for n in linears(model) if n not in left]
    assert quantize(model, scheme=f"{method}-w4a8") is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    replaced = {n: m for n, m in model.named_modules() if isinstance(m, TwinLinear)}
    assert set(replaced) == set(expected)
    assert linears(model) == left
    state = model.state_dict()
    for n, layer in replaced.items():
        packed = state[f"{n}.residual.weight_packed"]
        assert packed.dtype == torch.uint8
        assert packed.shape == (layer.out_features, layer.in_features // 2)
        assert f"{n}.weight" not in state
        assert (f"{n}.down.weight_packed" in state) == (method == "twin")
        assert (f"{n}.down" in state) == (method == "svdquant")
        assert (f"{n}.bias" in state) == (
            name == "Bert" or (name == "Qwen2" and n.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj"))
        )
    report = tqcompile.report(model)
    assert {record.name for record in report.layers} == set(expected)
    for record in report.layers:
        layer = replaced[record.name]
        assert record.shape == (layer.out_features, layer.in_features)
        assert record.scheme == f"{method}-w4a8"
        assert record.rank == layer.spec.rank
        assert 0 < record.error < 0.35, record
        rotation = layer.transform.rotation
        stored = rotation is not None and not layer.transform.signs
        # A learned (128, 128) rotation is as large as some of these layers, and stored.
        extra = 16 * rotation.numel() / (layer.out_features * layer.in_features) if stored else 0
        extra += 32 / layer.out_features if layer.spec.scaled else 0
        assert 4.2 < record.bits < 12 + extra
        assert record.seconds >= 0
        learned = "learned rotation" in record.transform
        assert ("hadamard" in record.transform or learned) == (method in ("twin", "quarot", "spinquant"))
        assert not learned or record.learned_error < record.closed_error
        assert not stored or learned
        assert (record.learned_error is not None) == (method in ("twin", "spinquant"))
    assert set(report.skipped) == set(linears(model))
    assert report.config["scheme"] == f"{method}-w4a8"
    # Random weights, four times as large as usual, amplify every error; unrelated logits would give 1.4.
    assert relative(logits(model), before) < 0.7
    if name != "Bert":
        out = model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False)
        assert out.shape == (2, 9)


def test_more_care_gives_better_logits():
    before, error = logits(tiny("Qwen3")), {}
    data = tokens(48, 16)
    for scheme in ("rtn-w4a8", "twin-w4a8", "twin-w4a4", "rtn-w4a4"):
        error[scheme] = relative(logits(quantize(tiny("Qwen3"), data, scheme=scheme)), before)
    assert error["twin-w4a8"] < error["rtn-w4a8"]
    assert error["twin-w4a4"] < error["rtn-w4a4"]
    assert error["twin-w4a8"] < error["twin-w4a4"]


def test_scales_are_absorbed_and_the_report_says_where():
    model = tiny("Qwen3")
    with torch.no_grad():  # outlier channels that only a scale can tame
        model.model.layers[0].post_attention_layernorm.weight[[3, 70]] *= 40
        model.model.layers[0].mlp.up_proj.weight[[5, 9]] *= 40
        model.model.layers[0].self_attn.v_proj.weight[[1, 40]] *= 40
    gain = model.model.layers[0].post_attention_layernorm.weight.clone()
    before = logits(model)
    quantize(model, scheme="svdquant-w4a8")
    where = {record.name: record.transform for record in tqcompile.report(model).layers}
    layer = "model.layers.0"
    assert where[f"{layer}.mlp.gate_proj"] == f"scale in {layer}.post_attention_layernorm"
    assert where[f"{layer}.mlp.down_proj"] == f"scale in {layer}.mlp.up_proj"
    assert where[f"{layer}.self_attn.o_proj"] == f"scale in {layer}.self_attn.v_proj"
    assert not torch.equal(model.model.layers[0].post_attention_layernorm.weight, gain)
    assert not any(m.spec.scaled for m in model.modules() if isinstance(m, TwinLinear))
    assert relative(logits(model), before) < 0.3


def test_without_data_the_report_says_so():
    model = tqcompile.compile(tiny("Llama"), **SETTINGS)
    report = tqcompile.report(model)
    assert any("no calibration data" in note for note in report.notes)
    assert [record.error for record in report.layers] == [None] * 14
    assert "data-free" in str(report)
    assert torch.isfinite(logits(model)).all()


def test_a_single_batch_is_noted():
    report = tqcompile.report(quantize(tiny("Llama"), tokens(4), scheme="rtn-w4a8"))
    assert any("a single calibration batch" in note for note in report.notes)
    assert all(record.error > 0 for record in report.layers)


def same_bytes(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a | b)


def test_the_seed_decides_every_byte():
    first, again, other = (quantize(tiny("Qwen3"), seed=seed, scheme="twin-w4a4") for seed in (5, 5, 6))
    assert same_bytes(first, again)
    assert torch.equal(logits(first), logits(again))
    assert not same_bytes(first, other)


def test_the_global_generator_does_not_matter():
    torch.manual_seed(1)
    first = quantize(tiny("Llama"))
    torch.manual_seed(2)
    model = tiny("Llama")
    torch.manual_seed(3)
    assert same_bytes(first, quantize(model))


@pytest.mark.parametrize("scheme", ["twin-w4a8", "svdquant-w4a4"])
def test_a_bfloat16_model_stays_one(scheme):
    model = as_bfloat16(tiny("Qwen2"))
    before = logits(model).float()
    quantize(model, scheme=scheme)
    after = logits(model)
    assert after.dtype == torch.bfloat16
    assert relative(after.float(), before) < (0.45 if scheme == "twin-w4a8" else 0.8)
    kept = {n: p.dtype for n, p in model.named_parameters()}
    assert set(kept.values()) == {torch.bfloat16}
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16


def test_every_setting_reaches_the_layers():
    config = Config(scheme="svdquant-w4a16", rank=8, group_size=32, ignore=("lm_head", "layers.0", "re:.*v_proj"))
    model = tqcompile.compile(tiny("Llama"), tokens(), config=config, rank=10, progress=False, backend=None)
    specs = {n: m.spec for n, m in model.named_modules() if isinstance(m, TwinLinear)}
    assert {(s.rank, s.group_size, s.act_bits, s.low_rank_bits) for s in specs.values()} == {(10, 32, 16, 16)}
    assert len(specs) == 6
    skipped = tqcompile.report(model).skipped
    assert skipped["model.layers.0.mlp.up_proj"] == "ignored by 'layers.0'"
    assert skipped["model.layers.1.self_attn.v_proj"] == "ignored by 're:.*v_proj'"


def test_widths_that_groups_do_not_divide_are_skipped_by_name():
    report = tqcompile.report(quantize(tiny("Llama"), group_size=128))
    for index in (0, 1):
        reason = report.skipped[f"model.layers.{index}.mlp.down_proj"]
        assert reason == "in_features 192 is not divisible by group_size 128"
    assert len(report.layers) == 12


def test_tied_weights_are_skipped_by_name():
    model = tiny("Qwen3", tie_word_embeddings=True)
    report = tqcompile.report(quantize(model, ignore=()))
    assert report.skipped == {"lm_head": "its weight is tied to model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_fused_experts_are_skipped_by_name():
    model = tiny("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    report = tqcompile.report(quantize(model))
    assert "fused expert parameter of shape (4, 128, 128)" in report.skipped["model.layers.0.mlp.experts.gate_up_proj"]
    assert "router" in report.skipped["model.layers.1.mlp.gate"].lower()
    assert len(report.layers) == 8
    assert torch.isfinite(logits(model)).all()


class Branching(nn.Module):
    """Does not export: what runs depends on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(64, 64), nn.Linear(64, 48), nn.LayerNorm(64)

    def forward(self, x):
        x = self.norm(self.a(x))
        return self.b(x if x.abs().sum() > 0 else -x)


def test_a_module_that_does_not_export_is_quantized_without_a_graph():
    torch.manual_seed(0)
    model = Branching()
    g = torch.Generator().manual_seed(4)
    data = [{"x": torch.randn(40, 64, generator=g)} for _ in range(5)]
    before = model(data[0]["x"]).detach()
    quantize(model, data, scheme="twin-w4a8")
    report = tqcompile.report(model)
    assert any("Branching does not export" in note for note in report.notes)
    assert {record.name for record in report.layers} == {"a", "b"}
    assert relative(model(data[0]["x"]), before) < 0.15


def nan_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")


def nan_bias(model):
    model.model.layers[1].self_attn.v_proj.bias.data[3] = float("inf")


def bad_embedding(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("inf")


def nothing(_model):
    pass


REFUSED = {
    "NaN weights": (nan_weight, {}, None, ModelError, "model.layers.1.mlp.up_proj.weight holds NaN"),
    "infinite bias": (nan_bias, {}, None, ModelError, "model.layers.1.self_attn.v_proj.bias holds NaN or infinity"),
    "NaN activations": (bad_embedding, {}, None, CalibrationError, "model.layers.0.self_attn.q_proj: its input is NaN"),
    "unknown token": (
        nothing,
        {},
        [[1, 2, 97]],
        CalibrationError,
        "token id 97 is outside the model's vocabulary of 97",
    ),
    "texts": (nothing, {}, ["text"], CalibrationError, "no tokenizer was given"),
    "empty data": (nothing, {}, [], CalibrationError, "calib_data is empty"),
    "a pattern for nothing": (
        nothing,
        {"ignore": ("q_porj",)},
        None,
        ConfigError,
        "ignore pattern 'q_porj' matches no",
    ),
    "everything ignored": (nothing, {"ignore": ("re:.*",)}, None, ModelError, "no layer of Qwen2ForCausalLM can be"),
    "rank too large": (nothing, {"rank": 128}, None, ModelError, "rank 128 is not below min("),
    "unknown scheme": (nothing, {"scheme": "w4"}, None, ConfigError, "unknown scheme 'w4'"),
    "unknown setting": (nothing, {"group": 64}, None, ConfigError, "unknown setting 'group'"),
    "unknown backend": (
        nothing,
        {"backend": "inductor"},
        None,
        ConfigError,
        "backend must be 'auto', 'twinquant' or None",
    ),
    "config of another kind": (
        nothing,
        {"config": {"rank": 8}},
        None,
        ConfigError,
        "must be a tqcompile.Config, got dict",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("entry", ["compile", "attach_recipe"])
def test_a_refusal_is_clear_and_leaves_the_model_as_it_was(case, entry):
    damage, changes, data, error, message = REFUSED[case]
    model = tiny("Qwen2").train()
    model.model.layers[0].eval()
    damage(model)
    before = snapshot(model)
    settings = {**SETTINGS, "rank": 16, **changes}
    if entry == "attach_recipe":
        if "backend" in changes:
            pytest.skip("attach_recipe has no backend")
        del settings["backend"]
    with pytest.raises(error) as caught:
        getattr(tqcompile, entry)(model, tokens() if data is None else data, **settings)
    assert message in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Qwen/Qwen3-8B", "expected an nn.Module, got str"),
        (nn.Sequential(nn.Conv1d(3, 3, 3), nn.ReLU()), "Sequential has no nn.Linear layer"),
        (nn.Linear(64, 64, device="meta"), "weight is on the meta device"),
    ],
)
def test_models_that_cannot_be_quantized(model, message):
    with pytest.raises(ModelError, match=message):
        tqcompile.compile(model, progress=False)


def test_quantizing_twice_is_refused_and_changes_nothing():
    model = quantize(tiny("Llama"), scheme="rtn-w4a8")
    before = snapshot(model)
    with pytest.raises(ModelError, match="already quantized by tqcompile"):
        quantize(model)
    assert_unchanged(model, before)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize(
    ("name", "error"), [("Qwen3", NumericError("site")), ("Qwen3", KeyboardInterrupt()), ("Bert", Interrupted())]
)
def test_a_failure_in_the_middle_puts_everything_back(monkeypatch, name, error):
    model = tiny(name).train()
    model.eval()
    expected = logits(model)
    model.train()
    before, calls = snapshot(model), []
    real = select.quantize_site

    def fails(problem, transform):
        calls.append(problem.name)
        if len(calls) == 12:  # the second block: norms have absorbed and linears are replaced by then
            assert any(isinstance(module, TwinLinear) for module in model.modules())
            raise error
        return real(problem, transform)

    monkeypatch.setattr(select, "quantize_site", fails)
    with pytest.raises(type(error)):
        quantize(model)
    assert len(calls) == 12
    assert_unchanged(model, before)
    assert torch.equal(logits(model.eval()), expected)
    monkeypatch.undo()
    quantize(model)  # and it can be tried again
    assert tqcompile.report(model).layers


def test_attach_recipe_leaves_the_model_and_remembers_the_components():
    model = tiny("Qwen2").train()
    model.model.layers[1].eval()
    before = snapshot(model)
    settings = {name: value for name, value in SETTINGS.items() if name != "backend"}
    report = tqcompile.attach_recipe(model, tokens(), scheme="twin-w4a4", **settings)
    assert_unchanged(model, before)
    assert len(report.layers) == 14
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    for record in report.layers:
        layer = model.get_submodule(record.name)
        found = recipes.lookup(layer.weight)
        assert found.spec.act_bits == 4
        assert "absorbed" not in record.transform
        assert "scale in" not in record.transform
        if layer.in_features == 128:
            assert relative(TwinLinear.from_quantized(found)(x), layer(x).detach()) < 0.5
    assert all(recipes.lookup(p) is None for n, p in model.named_parameters() if "proj.weight" not in n)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 48)

    def forward(self, x):
        return self.linear(self.norm(x))


def test_the_consumer_undoes_the_scale_that_the_norm_really_took():
    # A bfloat16 LayerNorm takes powers of two only: up to a factor of 1.4 from what was asked for.
    torch.manual_seed(5)
    model = Normed()
    with torch.no_grad():
        model.norm.weight.mul_(torch.exp(torch.randn(64)))
        model.norm.bias.normal_()
    model.to(torch.bfloat16)
    g = torch.Generator().manual_seed(6)
    data = [{"x": torch.randn(80, 64, generator=g).to(torch.bfloat16)} for _ in range(4)]
    before = model(data[-1]["x"]).detach().float()
    quantize(model, data, scheme="svdquant-w4a16")
    (record,) = tqcompile.report(model).layers
    assert record.transform == "scale in norm"
    # Ignoring the difference would cost about 0.2.
    assert record.error < 0.08
    assert relative(model(data[-1]["x"]).float(), before) < 0.08


class Chain(nn.Module):
    """Each block's norm feeds the next block's linear and nothing else: it can absorb that linear's scale."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_norm_of_an_earlier_block_is_not_changed_behind_its_recorded_outputs():
    torch.manual_seed(3)
    model = Chain()
    with torch.no_grad():
        for layer in model.layers:
            layer[1].weight[[4, 40]] *= 50
    reference = copy.deepcopy(model)
    g = torch.Generator().manual_seed(4)
    data = [{"x": torch.randn(60, 64, generator=g)} for _ in range(6)]
    quantize(model, data, scheme="svdquant-w4a8")
    for record in tqcompile.report(model).layers:
        # Measured again on the finished model's own activations: the report's errors must be those of this model.
        seen = []
        handle = model.get_submodule(record.name).register_forward_hook(
            lambda m, args, out, seen=seen: seen.append((args[0], out))
        )
        model(data[-1]["x"])
        handle.remove()
        (x, y), linear = seen[0], reference.get_submodule(record.name)
        assert relative(y, linear(x).detach()) < 2 * record.error + 1e-3, record


def test_ignored_names_by_default():
    assert Config().ignore == DEFAULT_IGNORE == ("lm_head",)


@pytest.mark.parametrize(
    ("name", "scheme"), [("Qwen3", "twin-w4a16"), ("Llama", "twin-w4a8"), ("Qwen2", "quarot-w4a8")]
)
def test_the_rotation_of_heads_moves_into_the_value_projection(name, scheme):
    model, seen = tiny(name), []

    def keep(_module, args, output):
        seen.append((args[0].detach(), output.detach()))

    def run():
        handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(keep)
        logits(model)
        handle.remove()

    run()
    quantize(model, scheme=scheme, steps=10)
    run()
    layer = model.model.layers[0].self_attn.o_proj
    assert layer.spec.rotation_block == 0
    assert not layer.spec.scaled
    assert layer.transform.rotation is None
    (x, y), (x_q, y_q) = seen
    assert relative(y_q, y) < 0.3
    assert relative(x_q, x) > 0.8  # heads are rotated
    record = next(r for r in tqcompile.report(model).layers if r.name == "model.layers.0.self_attn.o_proj")
    assert "32 in model.layers.0.self_attn.v_proj" in record.transform
    assert "on-line" not in record.transform
    assert record.error < 0.2
    down = next(r for r in tqcompile.report(model).layers if r.name == "model.layers.0.mlp.down_proj")
    # 2 K b for the rotation against 2 N K for the layer, b = 64 and N = 128.
    assert "; 50.00% FLOPs on-line" in down.transform


@pytest.mark.parametrize(("tied", "lm_head"), [(False, "keep"), (True, "keep"), (True, "w8a16")])
def test_a_rotated_residual_stream_leaves_no_rotation_to_the_linears_that_read_it(tmp_path, tied, lm_head):
    model = tiny("Qwen3", tie_word_embeddings=tied)
    embedding, expected = model.get_input_embeddings().weight.detach().clone(), logits(model)
    quantize(model, scheme="twin-w4a16", rotate_stream=True, lm_head=lm_head, steps=10)
    report = tqcompile.report(model)
    assert any("residual stream was rotated" in note for note in report.notes)
    assert any("tied" in note for note in report.notes) == tied
    for record in report.layers:
        if record.name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            assert "hadamard of the residual stream" in record.transform
            assert "on-line" not in record.transform
            assert model.get_submodule(record.name).transform.rotation is None
    assert relative(model.get_input_embeddings().weight, embedding) > 0.5
    # Rounding, and no more: without it the function would be unchanged (tests/test_rotate_residual_stream.py).
    plain = quantize(tiny("Qwen3", tie_word_embeddings=tied), scheme="twin-w4a16", lm_head=lm_head, steps=10)
    assert relative(logits(model), expected) < 1.5 * relative(logits(plain), expected)
    tqcompile.save(model, tmp_path / "model")
    assert torch.equal(logits(tqcompile.load(tmp_path / "model")), logits(model))


def test_a_residual_stream_that_cannot_be_rotated_is_reported():
    model = tiny("Bert")
    quantize(model, rotate_stream=True)
    notes = [note for note in tqcompile.report(model).notes if "not rotated" in note]
    assert len(notes) == 1
    assert notes[0].partition(": ")[2]


def test_heads_that_a_rotation_would_mix_too_little_keep_the_on_line_one():
    model = tiny("Llama", num_attention_heads=8, num_key_value_heads=8, head_dim=16)
    quantize(model)
    assert model.model.layers[0].self_attn.o_proj.spec.rotation_block == 128
