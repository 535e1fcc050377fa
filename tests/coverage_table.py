"""What works for which architecture, measured on small models of random sizes: the table of docs/coverage.md.

``PYTHONPATH=. python tests/coverage_table.py`` writes it; ``test_coverage.py`` holds it to be what is measured.
"""

import collections
import dataclasses
import random
import re
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import tqcompile
from tqcompile import backend, recipes
from tqcompile.config import Config
from tqcompile.errors import TQError
from tqcompile.modules import TwinLinear
from tqcompile.passes.analyze import analyze
from tqcompile.passes.replace_conv1d import replace_conv1d
from tqcompile.passes.replace_linear import Journal

DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"
VOCABULARY = 97
SETTINGS = {"scheme": "twin-w4a8", "rank": 8, "group_size": 32, "steps": 1, "tune": 1}
HEADINGS = (
    "model",
    "linears",
    "with an absorber",
    "save, load",
    "backend, quantized",
    "backend, plain",
    "left as it is",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """An architecture: its class in transformers, and settings beside the sizes."""

    model: str
    settings: dict = dataclasses.field(default_factory=dict)
    names: dict = dataclasses.field(default_factory=dict)  # where the config names a size otherwise

    @property
    def is_vision(self) -> bool:
        return self.model.startswith("ViT")


_GPT2 = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"}
_GPT2 |= {"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
CASES = {
    "Llama": Case("LlamaForCausalLM"),
    "Qwen2": Case("Qwen2ForCausalLM"),
    "Qwen3": Case("Qwen3ForCausalLM", {"head_dim": 32}),
    "Mistral": Case("MistralForCausalLM", {"sliding_window": 8}),
    "Gemma": Case("GemmaForCausalLM", {"head_dim": 32}),
    "Phi": Case("PhiForCausalLM"),
    "GPT-2": Case("GPT2LMHeadModel", {"use_cache": False}, _GPT2),
    "OPT": Case("OPTForCausalLM", {"word_embed_proj_dim": None}, {"intermediate_size": "ffn_dim"}),
    "BERT": Case("BertForSequenceClassification", {"num_labels": 12}),
    "ViT": Case("ViTForImageClassification", {"image_size": 32, "patch_size": 8, "num_labels": 12}),
    "Mixtral": Case("MixtralForCausalLM", {"num_local_experts": 4}),
    "Qwen3-MoE": Case("Qwen3MoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
}


def build(name: str, seed: int | None = None) -> nn.Module:
    """A model with random weights, of random small sizes, in eval mode. The same seed gives the same model."""
    import transformers

    case = CASES[name]
    seed = zlib.crc32(name.encode()) if seed is None else seed
    draw = random.Random(seed)
    heads = draw.choice((2, 4))
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * draw.choice((32, 64)),
        "intermediate_size": 32 * draw.randint(5, 9),
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice((1, 2)),
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    settings = {case.names.get(key, key): value for key, value in sizes.items()} | case.settings
    if settings.get("word_embed_proj_dim", 0) is None:
        settings["word_embed_proj_dim"] = settings["hidden_size"]
    architecture = getattr(transformers, case.model)
    torch.manual_seed(seed)
    model = architecture(architecture.config_class(**settings))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)  # the usual 0.02 makes outputs so flat that equal ones would say little
            elif key.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def data(name: str, batches: int, seed: int) -> list[dict]:
    """Random inputs: token ids or pictures."""
    generator = torch.Generator().manual_seed(seed)
    if CASES[name].is_vision:
        return [{"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)} for _ in range(batches)]
    return [{"input_ids": torch.randint(3, VOCABULARY, (4, 12), generator=generator)} for _ in range(batches)]


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def measure(name: str) -> tuple[str, ...]:
    """One row of the table."""
    *quantized, left = _quantized(name)
    return (name, *quantized, _plain(name), left)


def _weights(model: nn.Module) -> set[str]:
    """Every product with weights that a report must account for: linears, Conv1D, fused experts."""
    found = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    return found | {n for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n}


def _attempt(work: Callable[[], str]) -> str:
    try:
        return work()
    except TQError as error:
        return f"no: {error}"


def compiled(name: str) -> nn.Module:
    return tqcompile.compile(build(name), data(name, 3, 1), backend=None, progress=False, **SETTINGS)


def _quantized(name: str) -> tuple[str, str, str, str, str]:
    """(linears, with an absorber, save and load, backend on the quantized model, left)."""
    try:
        model = compiled(name)
    except TQError as error:
        return (f"no: {error}", "", "", "", "")
    report = tqcompile.report(model)
    done = {layer.name for layer in report.layers}
    expected = _weights(build(name))
    assert done | set(report.skipped) >= expected, expected - done - set(report.skipped)
    (batch,) = data(name, 1, 2)
    want = logits(model, batch)

    def reload() -> str:
        with tempfile.TemporaryDirectory() as folder:
            tqcompile.save(model, Path(folder) / "q")
            return "bit-equal" if torch.equal(logits(tqcompile.load(Path(folder) / "q"), batch), want) else "differs"

    def through_backend() -> str:
        torch._dynamo.reset()
        backend.reports.clear()
        got = logits(torch.compile(model, backend="twinquant", options={"inner": "aot_eager"}), batch)
        ops = sum(len(report.lowered) for report in backend.reports)
        # Other kernels may sum in another order, and move a rounding to eight bits.
        equal = (got - want).norm() <= 1e-3 * want.norm()
        return f"{ops} ops, {_graphs()}" if equal else "differs"

    return (
        f"{len(done)} of {len(expected)}",
        f"{_absorbed(name)} of {len(done)}",
        _attempt(reload),
        _attempt(through_backend),
        _reasons(report.skipped),
    )


def _absorbed(name: str) -> int:
    """Linears whose input scale a neighbour could take, by the graph. Whether one is used depends on the data."""
    model = build(name)
    replace_conv1d(model, Journal(model))
    plan = analyze(model, data(name, 1, 1)[0], Config(**SETTINGS))
    return sum(len(site.linears) for site in plan.sites if site.absorber is not None)


def _graphs() -> str:
    count = len(backend.reports)
    return "1 graph" if count == 1 else f"{count} graphs"


def _plain(name: str) -> str:
    """The backend on the original model, against the same components in the place of its linears."""
    model = build(name).requires_grad_(False)
    (batch,) = data(name, 1, 2)
    settings = {key: SETTINGS[key] for key in ("scheme", "rank", "group_size")}
    torch._dynamo.reset()
    backend.reports.clear()

    def run() -> str:
        got = logits(torch.compile(model, backend="twinquant", options={"inner": "eager", **settings}), batch)
        names = [name for report in backend.reports for name in report.quantized]
        for linear in dict.fromkeys(names):
            layer = model.get_submodule(linear)
            quantized = recipes.remembered(layer.weight, layer.bias, Config(**settings))
            model.set_submodule(linear, TwinLinear.from_quantized(quantized))
        equal = (got - logits(model, batch)).norm() <= 1e-3 * got.norm()
        return f"{len(set(names))} linears, {_graphs()}" if equal else "differs"

    return _attempt(run)


def _reasons(skipped: dict[str, str]) -> str:
    """Each reason once, with how many weights have it."""
    counts = collections.Counter(re.sub(r" of shape .*?\)", "", reason) for reason in skipped.values())
    return "; ".join(f"{count}: {reason}" for reason, count in sorted(counts.items()))


def row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell or '-' for cell in cells)} |"


def write(rows: list[str]) -> None:
    """Replace the table of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, _ = text.partition("\n| model |")
    table = [row(HEADINGS), "|" + "---|" * len(HEADINGS), *rows]
    DOCUMENT.write_text(head + "\n" + "\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write([row(measure(name)) for name in CASES])
