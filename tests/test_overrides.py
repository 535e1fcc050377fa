"""Overrides: which layer gets which settings, and mixed layers from compile to the checkpoint, the backend and ONNX."""

import json

import pytest
import torch
from tiny_models import SETTINGS, logits, snapshot, tiny, tokens

import tqcompile
from tqcompile.config import Config, read_overrides
from tqcompile.errors import ConfigError

MIXED = {
    "layers.1.self_attn.o_proj": "keep",
    "re:.*down_proj": {"scheme": "twin-w3a16", "rank": 8},
    "v_proj": {"rank": 8},
    "layers.0.mlp.up_proj": {"scheme": "d2-w2a16"},
    "re:.*layers\\.0\\.mlp.*": {"group_size": 32},
}


@pytest.fixture(scope="module")
def original():
    return tiny("Qwen3")


@pytest.fixture(scope="module")
def mixed():
    settings = SETTINGS | {"steps": 2, "tune": 2}
    return tqcompile.compile(tiny("Qwen3"), tokens(), scheme="twin-w4a8", overrides=MIXED, **settings)


def test_the_first_pattern_counts_and_json_that_sorts_keys_keeps_the_order():
    config = Config(overrides=MIXED)
    assert config.for_layer("model.layers.0.mlp.down_proj") == Config(scheme="twin-w3a16", rank=8)
    assert config.for_layer("model.layers.0.mlp.gate_proj") == Config(group_size=32)
    assert config.for_layer("model.layers.1.mlp.gate_proj") == Config()
    assert config.override_of("model.layers.1.self_attn.o_proj") == ("layers.1.self_attn.o_proj", "keep")
    again = Config.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert again == config
    assert hash(again) == hash(config)
    assert len(config.variants()) == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("down_proj", "overrides must be like"),
        ([("a",)], "overrides must be like"),
        ({"": "keep"}, "non-empty strings, got ''"),
        ({"re:(": "keep"}, "'re:(' is not a regular expression"),
        ({"a": "drop"}, "'a' must be settings or 'keep', not 'drop'"),
        ({"a": {}}, "may set scheme, rank, group_size"),
        ({"a": {"steps": 3}}, "may set scheme, rank, group_size"),
        ({"a": {"rank": 7}}, "overrides of 'a': rank must be even"),
        ({"a": {"scheme": "int4"}}, "overrides of 'a': unknown scheme 'int4'"),
    ],
)
def test_refusals_name_the_pattern(overrides, message):
    with pytest.raises(ConfigError) as caught:
        Config(overrides=overrides)
    assert message in str(caught.value)


def test_the_command_line_spells_overrides_as_words():
    texts = ["re:.*down_proj scheme=twin-w3a16 rank=8", "layers.0 keep"]
    assert read_overrides(texts) == [("re:.*down_proj", {"scheme": "twin-w3a16", "rank": 8}), ("layers.0", "keep")]
    for text in ("", "mlp", "mlp rank", "mlp rank=", "mlp keep rank=8"):
        with pytest.raises(ConfigError, match="must be 'PATTERN keep' or"):
            read_overrides([text])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dwn_proj": {"rank": 8}}, "matches no linear layer of the model; linear layers are named like"),
        ({"input_layernorm": "keep"}, "matches no linear layer"),
        ({"mlp": {"rank": 8}, "down_proj": "keep"}, "'down_proj' never counts: earlier patterns match all"),
        ({"lm_head": {"rank": 8}}, "matches only layers in ignore (lm_head"),
    ],
)
def test_a_pattern_without_effect_is_an_error_and_the_model_stays(original, overrides, message):
    before = snapshot(original)
    with pytest.raises(ConfigError) as caught:
        tqcompile.compile(original, tokens(), overrides=overrides, **SETTINGS)
    assert message in str(caught.value)
    after = snapshot(original)
    assert after["modules"] == before["modules"]
    assert all(torch.equal(after["state"][name], tensor) for name, tensor in before["state"].items())


def test_every_layer_has_its_settings_and_split_readers_of_one_norm_keep_their_scale(mixed):
    report = tqcompile.report(mixed)
    layers = {layer.name.removeprefix("model."): layer for layer in report.layers}
    assert report.skipped["model.layers.1.self_attn.o_proj"] == "kept by the override 'layers.1.self_attn.o_proj'"
    assert {n: (layers[n].scheme, layers[n].rank) for n in layers if n.startswith("layers.0.")} == {
        "layers.0.self_attn.q_proj": ("twin-w4a8", 16),
        "layers.0.self_attn.k_proj": ("twin-w4a8", 16),
        "layers.0.self_attn.v_proj": ("twin-w4a8", 8),
        "layers.0.self_attn.o_proj": ("twin-w4a8", 16),
        "layers.0.mlp.gate_proj": ("twin-w4a8", 16),
        "layers.0.mlp.up_proj": ("d2-w2a16", 0),
        "layers.0.mlp.down_proj": ("twin-w3a16", 8),
    }
    assert mixed.model.layers[0].mlp.gate_proj.spec.group_size == 32
    for name in ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.0.mlp.up_proj"):
        assert "in model.layers.0.input_layernorm" not in layers[name].transform
        assert "in model.layers.0.post_attention_layernorm" not in layers[name].transform
    assert {block.name for block in report.blocks} == {"model.layers.0", "model.layers.1"}
    assert all(layer.error is not None and layer.error < 1 for layer in report.layers)
    assert report.config["overrides"] == Config(overrides=MIXED).to_dict()["overrides"]


def test_readers_that_are_split_are_no_worse_than_together():
    """A split site has its own transform, so a rank override that changes nothing else costs no accuracy.

    One tiny model's error moves by a fifth with the order of a sum, so three of them count.
    """
    found = [0.0, 0.0]
    for seed in range(3):
        exact = logits(tiny("Qwen3", seed))
        for i, overrides in enumerate(({}, {"v_proj": {"rank": 18}, "up_proj": {"rank": 18}})):
            model = tiny("Qwen3", seed)
            tqcompile.compile(model, tokens(), scheme="twin-w4a16", overrides=overrides, **SETTINGS)
            found[i] += float((logits(model) - exact).norm() / exact.norm())
    assert found[1] < 1.15 * found[0]


def test_checkpoints_of_mixed_layers_come_back(mixed, tmp_path):
    from transformers import AutoModelForCausalLM

    tqcompile.save(mixed, tmp_path / "out")
    for again in (tqcompile.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert torch.equal(logits(again), logits(mixed))
        assert Config.from_dict(again.tqcompile_quantization["config"]).overrides == Config(overrides=MIXED).overrides
    assert tqcompile.report(again).to_dict() == tqcompile.report(mixed).to_dict()


@pytest.mark.parametrize("lower", [None, True])
def test_the_backend_compiles_mixed_layers(mixed, lower):
    import tqcompile.backend  # noqa: F401

    torch._dynamo.reset()
    compiled = torch.compile(mixed, backend="twinquant", options={"lower": lower, "inner": "eager"})
    expected = logits(mixed)
    assert torch.allclose(logits(compiled), expected, atol=2e-2 * float(expected.abs().max()))
    with pytest.raises(Exception, match="overrides is a setting of"):
        torch.compile(mixed, backend="twinquant", options={"overrides": MIXED})(input_ids=tokens(2, 7))


def test_mixed_layers_export_to_onnx(mixed, tmp_path):
    pytest.importorskip("onnxruntime")
    tqcompile.export_onnx(mixed, tmp_path / "model.onnx", verify_steps=2)  # an error where outputs differ
    assert (tmp_path / "model.onnx").is_file()


def test_a_dense_low_rank_in_a_tuned_block_is_named():
    settings = SETTINGS | {"tune": 1, "steps": 0}
    model = tqcompile.compile(tiny("Llama"), tokens(), overrides={"o_proj": {"scheme": "svdquant-w4a8"}}, **settings)
    notes = "\n".join(tqcompile.report(model).notes)
    assert "model.layers.0: not tuned, the low rank of model.layers.0.self_attn.o_proj is not quantized" in notes
    assert tqcompile.report(model).blocks == []
