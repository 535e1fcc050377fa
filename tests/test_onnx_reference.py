"""The ops of com.tqcompile as documented: what is written from docs/onnx.md alone computes what torch does."""

import numpy as np
import pytest
import torch
from random_components import random_codes, random_components
from tiny_models import SETTINGS, tiny, tokens
from torch import nn

import tqcompile
from tqcompile.modules import Int8Linear, LatticeLinear, TwinLinear
from tqcompile.output_head import round_head

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from onnx_runtime_in_python import DOMAIN, OPS  # noqa: E402


def evaluator(path):
    """The file without its function bodies: every op of ours must come from the second implementation."""
    proto = onnx.load(str(path))
    names = {node.op_type for node in proto.graph.node if node.domain == DOMAIN}
    del proto.functions[:]
    return reference.ReferenceEvaluator(proto, new_ops=OPS), names


class Layers(nn.Module):
    """Side by side: every documented op name, at odd sizes; x (..., 96) -> (..., sum of widths)."""

    def __init__(self):
        super().__init__()
        forms = [
            {"act_bits": bits, "rank": rank, "bias": bias, "n": 10 + rank, "seed": bits + rank}
            for bits in (16, 8, 4)
            for rank in (10, 0)
            for bias in (torch.float32, None)
        ]
        forms += [{"act_bits": 8, "block": block, "scaled": scaled} for block in (0, 48) for scaled in (True, False)]
        layers = [random_components(k=96, **form) for form in forms]
        self.layers = nn.ModuleList(TwinLinear.from_quantized(layer) for layer in layers)
        codes = [
            {"bits": bits, "lattice": lattice, "bias": bias, "n": 5 + bits + lattice, "seed": bits, "signs": "5a5af00f"}
            for bits in (2, 3)
            for lattice in (0, 4)
            for bias in (torch.float32, None)
        ]
        self.layers.extend(LatticeLinear.from_quantized(random_codes(**form)) for form in codes)
        for bias in (True, False):
            torch.manual_seed(int(bias))
            self.layers.append(round_head(nn.Linear(96, 7, bias=bias), 8, 32, None))

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], -1)


def test_every_documented_op(tmp_path):
    model = Layers().eval()
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))
    path = tqcompile.export_onnx(model, tmp_path / "layers.onnx", example={"x": x}).path
    run, names = evaluator(path)
    assert names == {op.__name__ for op in OPS}
    fresh = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(2))
    actual, expected = run.run(None, {"x": fresh.numpy()})[0], model(fresh).detach().numpy()
    start = 0
    for layer in model.layers:
        part = np.s_[..., start : start + layer.out_features]
        np.testing.assert_allclose(actual[part], expected[part], atol=2e-5 * np.abs(expected[part]).max())
        start += layer.out_features
    assert isinstance(layer, Int8Linear)
    assert start == actual.shape[-1]


@pytest.mark.parametrize("scheme", ["twin-w4a16", "twin-w4a8", "twin-w4a4"])
def test_a_decoder_with_its_cache(tmp_path, scheme):
    settings = {**SETTINGS, "scheme": scheme, "steps": 0, "lm_head": "w4a16"}
    model = tqcompile.compile(tiny("Qwen3", num_hidden_layers=1), tokens(), **settings)
    path = tqcompile.export_onnx(model, tmp_path / "model.onnx", verify_steps=2).path
    run, _ = evaluator(path)
    ids = tokens(2, 7, seed=11)
    past = {
        f"past_key_values.{i}.{part}": np.zeros((2, 2, 0, 32), np.float32) for i in (0,) for part in ("key", "value")
    }
    rows = []
    for new in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
        length = next(iter(past.values())).shape[2]
        total = length + new.shape[1]
        feed = {"input_ids": new.numpy(), "attention_mask": np.ones((2, total), np.int64)}
        feed["position_ids"] = np.tile(np.arange(length, total), (2, 1))
        outputs = dict(zip(run.output_names, run.run(None, feed | past), strict=True))
        rows.append(outputs["logits"])
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()
    relative = np.abs(np.concatenate(rows, 1) - expected).max(-1) / np.abs(expected).max()
    # one value that noise tips to the next step moves the logits of its position and of those after it
    assert np.median(relative) < 1e-5
    assert relative.max() < (1e-5 if scheme == "twin-w4a16" else 0.1)
