"""Conv1D as nn.Linear: exact, undone on failure, and put back where it is not quantized."""

import pytest
import torch
from tiny_models import SETTINGS, assert_unchanged, logits, snapshot, tokens
from torch import nn

import tqcompile
from tqcompile.errors import TQError
from tqcompile.modules import TwinLinear
from tqcompile.passes.replace_conv1d import as_linear, is_conv1d, replace_conv1d, restore_conv1d
from tqcompile.passes.replace_linear import Journal


@pytest.fixture
def model():
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
    found = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=2))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.normal_(0, 0.1) if name.endswith("bias") else parameter.mul_(3)
    return found.eval()


def test_a_linear_computes_what_the_conv1d_does(model):
    module = model.transformer.h[1].mlp.c_fc
    linear = as_linear(module)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert linear.weight.shape == (512, 128)
    expected = torch.addmm(module.bias.double(), x, module.weight.double())
    torch.testing.assert_close(linear.double()(x), expected, rtol=1e-13, atol=1e-13)  # another order of sums
    assert not is_conv1d(linear)
    assert not is_conv1d(None)


def test_what_is_replaced_can_be_put_back(model):
    before, expected = snapshot(model), logits(model)
    journal = Journal(model)
    found = replace_conv1d(model, journal)
    assert len(found) == 8
    assert not [m for m in model.modules() if is_conv1d(m)]
    assert (logits(model) - expected).norm() < 1e-5 * expected.norm()
    restore_conv1d(model, found, journal)
    assert_unchanged(model, before)


def test_a_weight_of_two_modules_stays(model):
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    assert len(replace_conv1d(model, Journal(model))) == 6


def test_gpt2_is_quantized_saved_and_loaded(model, tmp_path):
    before = logits(model)
    ignore = ("lm_head", "transformer.h.1.mlp.c_fc")
    tqcompile.compile(model, tokens(), ignore=ignore, **{**SETTINGS, "scheme": "twin-w4a8", "tune": 2})
    assert len([m for m in model.modules() if isinstance(m, TwinLinear)]) == 7
    assert is_conv1d(model.transformer.h[1].mlp.c_fc)
    assert tqcompile.report(model).skipped["transformer.h.1.mlp.c_fc"] == "ignored by 'transformer.h.1.mlp.c_fc'"
    after = logits(model)
    assert 0 < (after - before).norm() < 0.3 * before.norm()
    tqcompile.save(model, tmp_path / "m")
    reloaded = tqcompile.load(tmp_path / "m")
    assert torch.equal(logits(reloaded), after)
    assert is_conv1d(reloaded.transformer.h[1].mlp.c_fc)


def test_a_failure_puts_everything_back(model):
    before = snapshot(model)
    with pytest.raises(TQError):
        tqcompile.compile(model, torch.full((2, 8), 10**6), progress=False, backend=None)
    assert_unchanged(model, before)


def test_other_modules_are_no_conv1d():
    class Conv1D(nn.Module):
        """Of the same name, and something else."""

    assert not is_conv1d(Conv1D())
    assert not is_conv1d(nn.Conv1d(2, 2, 1))
