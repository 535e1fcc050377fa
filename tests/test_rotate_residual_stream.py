"""A rotation of the residual stream is folded into the weights and leaves the model's function as it was."""

import json
import shutil

import pytest
import torch
from test_find_residual_stream import ACCEPTED, IDS, only
from tiny_models import (
    SETTINGS,
    as_bfloat16,
    assert_unchanged,
    in_float64,
    logits,
    random_orthogonal,
    snapshot,
    tiny,
    tokens,
)

import tqcompile
from tqcompile.checkpoint import quantization_config
from tqcompile.config import Config
from tqcompile.errors import CheckpointError, ConfigError, ModelError
from tqcompile.methods.hadamard import hadamard_matrix, random_signs, signed_hadamard
from tqcompile.passes.absorb_head_rotation import absorb_head_rotation, refuse_head_rotation
from tqcompile.passes.absorb_scale import absorb_into_norm, producer_channel, producer_scale
from tqcompile.passes.analyze import analyze
from tqcompile.passes.replace_linear import Journal
from tqcompile.passes.rotate_residual_stream import insert_after_norm, rotate_residual_stream, rotated_norms

SMALL = Config(group_size=32, rank=8)
# Biases of writers in Qwen3 (o_proj) and Llama (o_proj and down_proj), of readers in Qwen2 too.
MODELS = {
    "qwen3": ("Qwen3", {"attention_bias": True}),
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True}),
    "llama multi-head": ("Llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"hidden_size": 192, "num_attention_heads": 4}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.3}),
}


def sylvester(block):
    return signed_hadamard(random_signs(block, torch.Generator().manual_seed(3)))


ROTATIONS = {
    "full": lambda width: random_orthogonal(width),
    "shared blocks": lambda width: random_orthogonal(32),
    "blocks": lambda width: random_orthogonal(width // 64, 64),
    "bfloat16 hadamard": lambda width: sylvester(width & -width),
    "float32": lambda width: random_orthogonal(width).float(),
}


def planned(name):
    kind, changes = MODELS[name]
    model = in_float64(tiny(kind, **changes))
    return model, analyze(model, IDS, SMALL)


def relative(after, before):
    return (after - before).abs().max() / before.abs().max()


def gains(model, stream):
    return [model.get_parameter(f"{norm.module}.weight") for norm in stream.norms]


@pytest.mark.parametrize(
    ("name", "tied_head"), [*((name, "insert") for name in MODELS), ("qwen3 tied", "untie"), ("qwen2 tied", "untie")]
)
def test_the_function_of_a_whole_model_is_unchanged(name, tied_head):
    model, plan = planned(name)
    before = logits(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    for rotation in ROTATIONS.values():
        undone = Journal(model)
        notes = rotate_residual_stream(model, plan.stream, rotation(plan.stream.channels), undone, tied_head)
        assert relative(logits(model), before) < 1e-10
        assert len(notes) == bool(plan.stream.tied_head)
        changed = (*plan.stream.consumers, *plan.stream.producers, *plan.stream.embeddings)
        for module in changed:
            assert (model.get_parameter(f"{module}.weight") - weights.get(f"{module}.weight", 0)).abs().max() > 0.01
        undone.restore()
        assert torch.equal(logits(model), before)


def test_norms_of_float32_inside_lose_no_more_than_they_have():
    model = tiny("Qwen3").double()
    plan, before = analyze(model, IDS, SMALL), logits(model)
    rotate_residual_stream(model, plan.stream, sylvester(128), Journal(model))
    # Each of the five norms rounds to float32 once (2**-24), elsewhere in the two models.
    assert 0 < relative(logits(model), before) < 2.0**-24 * 5 * 20


@pytest.mark.parametrize("case", ACCEPTED)
def test_every_graph_that_is_accepted(case):
    names, forward, stream = ACCEPTED[case]
    net = only(*names)(forward).double()
    with torch.no_grad():
        before = net(**IDS)
        rotate_residual_stream(net, stream, random_orthogonal(32), Journal(net))
        after = net(**IDS)
    assert relative(after, before) < 1e-10


def test_the_readers_see_the_rotated_norm():
    model, plan = planned("qwen3")
    seen = {}
    for norm in plan.stream.norms:
        linear = model.get_submodule(norm.linears[0])
        linear.register_forward_pre_hook(lambda _, args, n=norm: seen.setdefault(n.module, []).append(args[0]))
    before = gains(model, plan.stream)
    logits(model)
    rotation = random_orthogonal(128)
    rotate_residual_stream(model, plan.stream, rotation, Journal(model))
    logits(model)
    for norm, gain in zip(plan.stream.norms, before, strict=True):
        plain, rotated = seen[norm.module]
        torch.testing.assert_close(rotated, plain / gain @ rotation, rtol=0, atol=1e-9)
    assert all(torch.equal(gain, torch.ones_like(gain)) for gain in gains(model, plan.stream))


@pytest.mark.parametrize("name", ["qwen3", "qwen3 tied", "llama multi-head", "qwen2"])
def test_all_absorptions_compose(name):
    model, plan = planned(name)
    before, journal = logits(model), Journal(model)
    rotate_residual_stream(model, plan.stream, sylvester(64), journal)
    kinds = []
    for seed, site in enumerate(plan.sites):
        if site.absorber is None:
            continue
        kinds.append(site.absorber.kind)
        linears = [model.get_submodule(linear) for linear in site.linears]
        channel = producer_channel(site.absorber, linears[0].in_features)
        # Powers of two: norms divide their gain in float32.
        exponent = torch.randint(-2, 3, (int(channel.max()) + 1,), generator=torch.Generator().manual_seed(seed))
        scale = torch.exp2(exponent.double())[channel]
        producer = model.get_submodule(site.absorber.module)
        if site.absorber.kind == "norm":
            assert torch.equal(absorb_into_norm(producer, scale).double(), scale)
        else:
            rows = producer_scale(site.absorber, scale)
            journal.set_parameter(f"{site.absorber.module}.weight", producer.weight / rows[:, None])
            if producer.bias is not None:
                journal.set_parameter(f"{site.absorber.module}.bias", producer.bias / rows)
        for linear in site.linears:
            journal.set_parameter(f"{linear}.weight", model.get_parameter(f"{linear}.weight") * scale)
        if not refuse_head_rotation(site):
            absorb_head_rotation(model, site, random_orthogonal(site.absorber.head_dim), journal)
    assert set(kinds) == {"norm", "attn_v", "linear"}
    assert relative(logits(model), before) < 1e-10


@pytest.mark.parametrize("name", ["qwen3", "qwen3 tied", "qwen2"])
@pytest.mark.parametrize("tied_head", ["insert", "untie"])
def test_the_journal_puts_everything_back(name, tied_head):
    kind, changes = MODELS[name]
    model = tiny(kind, **changes).train()
    model.lm_head.weight.requires_grad_(False)
    plan = analyze(model, IDS, SMALL)
    before, config = snapshot(model), model.config.to_dict()
    tied_keys = dict(model.all_tied_weights_keys)
    journal = Journal(model)
    rotate_residual_stream(model, plan.stream, sylvester(128), journal, tied_head)
    changed = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    tied = bool(plan.stream.tied_head)
    expected = {"lm_head.weight"} | ({"model.embed_tokens.weight"} if tied else set())
    assert changed == expected
    journal.restore()
    assert_unchanged(model, before)
    assert model.config.to_dict() == config
    assert model.all_tied_weights_keys == tied_keys
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_tied_head_stays_tied_behind_an_inserted_matrix():
    model, plan = planned("qwen3 tied")
    gain, rotation = model.model.norm.weight.detach().clone(), random_orthogonal(4, 32)
    (note,) = rotate_residual_stream(model, plan.stream, rotation, Journal(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    norm, linear = model.model.norm
    dense = torch.block_diag(*rotation)
    torch.testing.assert_close(linear.weight.t().contiguous(), dense.t() @ gain.diag() @ dense)
    assert torch.equal(norm.weight, torch.ones_like(gain))
    assert f"({128 * 128 * 8} bytes, {100 * 128 / 97:.2f}% of the head's FLOPs)" in note
    assert linear.weight.dtype == norm.weight.dtype == torch.float64


def test_an_untied_head_survives_saving(tmp_path):
    model = tiny("Qwen3", tie_word_embeddings=True)
    plan, before = analyze(model, IDS, SMALL), logits(model)
    (note,) = rotate_residual_stream(model, plan.stream, sylvester(128), Journal(model), "untie")
    assert f"{97 * 128 * 4} bytes more" in note
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_the_inserted_structure_takes_a_saved_state():
    model = tiny("Qwen3", tie_word_embeddings=True)
    plan = analyze(model, IDS, SMALL)
    rotate_residual_stream(model, plan.stream, sylvester(128), Journal(model))
    other = tiny("Qwen3", seed=1, tie_word_embeddings=True)
    random = torch.get_rng_state()
    insert_after_norm(other, "model.norm", Journal(other))
    assert torch.equal(torch.get_rng_state(), random)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantized model with a matrix behind its final norm, and the folder that it was saved to."""
    model = tiny("Qwen3", tie_word_embeddings=True)
    plan = analyze(model, IDS, SMALL)
    rotate_residual_stream(model, plan.stream, sylvester(128), Journal(model))
    assert rotated_norms(model) == ["model.norm"]
    tqcompile.compile(model, tokens(), scheme="twin-w4a8", **{**SETTINGS, "ignore": ("lm_head", "model.norm")})
    specs = model.tqcompile_quantization["modules"]
    found = quantization_config(SMALL, specs, rotated_norms(model))
    model.tqcompile_quantization.update(found)
    folder = tmp_path_factory.mktemp("rotated") / "model"
    tqcompile.save(model, folder)
    return model, folder


def test_a_checkpoint_keeps_the_inserted_matrix(saved):
    model, folder = saved
    again = tqcompile.load(folder)
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    tqcompile.save(again, folder.with_name("again"))
    assert torch.equal(logits(tqcompile.load(folder.with_name("again"))), logits(model))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("model.norm", "must be a list of module names, got 'model.norm'"),
        ([7], "must be a list of module names"),
        (["model.nrm"], "model.nrm: no norm of that name"),
        (["model.embed_tokens"], "model.embed_tokens: no norm of that name"),
        (["model.layers.0.input_layernorm"], r"input_layernorm.1.weight must be \[128, 128\], .* holds None"),
    ],
)
def test_a_checkpoint_that_describes_other_norms(saved, tmp_path, entry, reason):
    folder = shutil.copytree(saved[1], tmp_path / "altered")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["rotated_norms"] = entry
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=reason):
        tqcompile.load(folder)


@pytest.mark.parametrize("tied_head", ["insert", "untie"])
def test_a_quantized_head_of_a_rotated_model(tied_head, tmp_path):
    model = tiny("Qwen3", tie_word_embeddings=True)
    plan = analyze(model, IDS, SMALL)
    rotate_residual_stream(model, plan.stream, sylvester(128), Journal(model), tied_head)
    before = logits(model)
    ignore = ("lm_head", "model.layers.0", *(["model.norm"] if tied_head == "insert" else []))
    settings = {**SETTINGS, "ignore": ignore}
    tqcompile.compile(model, tokens(), scheme="rtn-w4a16", lm_head="w8a16", **settings)
    model.tqcompile_quantization.update(
        quantization_config(SMALL, model.tqcompile_quantization["modules"], rotated_norms(model))
    )
    assert rotated_norms(model) == (["model.norm"] if tied_head == "insert" else [])
    assert relative(logits(model), before) < 0.5  # one layer is rounded to 4 bits: the same function, roughly
    tqcompile.save(model, tmp_path / "model")
    assert torch.equal(logits(tqcompile.load(tmp_path / "model")), logits(model))


def test_generation_is_unchanged():
    model = tiny("Qwen3", tie_word_embeddings=True)
    plan, prompt = analyze(model, IDS, SMALL), tokens(2, 5, seed=4)
    before = model.generate(prompt, max_new_tokens=6, do_sample=False)
    rotate_residual_stream(model, plan.stream, sylvester(128), Journal(model))
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), before)


def test_bfloat16_weights_are_rounded_once():
    model = as_bfloat16(tiny("Llama"))
    plan = analyze(model, IDS, SMALL)
    table = model.model.embed_tokens.weight.detach().clone()
    rotate_residual_stream(model, plan.stream, sylvester(128), Journal(model))
    bits = [int(b) for digit in random_signs(128, torch.Generator().manual_seed(3)) for b in f"{int(digit, 16):04b}"]
    exact = (2.0 * torch.tensor(bits) - 1).double()[:, None] * hadamard_matrix(128, torch.float64)
    found = model.model.embed_tokens.weight
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (table.double() @ exact).bfloat16(), rtol=2.0**-8, atol=0)


@pytest.mark.parametrize(
    ("rotation", "reason"),
    [
        (torch.eye(48), "residual stream of 128 channels: 128 channels cannot be rotated"),
        (torch.eye(64).expand(3, 64, 64), "128 channels are 2 blocks of 64, got 3"),
        (torch.randn(128, 128, generator=torch.Generator().manual_seed(0)), "not orthogonal"),
    ],
)
def test_wrong_rotations_change_nothing(rotation, reason):
    model = tiny("Qwen3")
    plan, before = analyze(model, IDS, SMALL), snapshot(model)
    with pytest.raises(ConfigError, match=reason):
        rotate_residual_stream(model, plan.stream, rotation, Journal(model))
    with pytest.raises(ConfigError, match="tied_head must be one of insert, untie, got 'copy'"):
        rotate_residual_stream(model, plan.stream, sylvester(128), Journal(model), "copy")
    assert_unchanged(model, before)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_was_tied_or_untied_since(tied):
    model = tiny("Qwen3", tie_word_embeddings=tied)
    plan = analyze(model, IDS, SMALL)
    weight = model.model.embed_tokens.weight
    model.lm_head.weight = torch.nn.Parameter(weight.detach().clone()) if tied else weight
    before = snapshot(model)
    with pytest.raises(ModelError, match="when the model was analysed"):
        rotate_residual_stream(model, plan.stream, sylvester(128), Journal(model))
    assert_unchanged(model, before)
