"""The main job on a GPU: quantize, compile, generate, on the embedded model and at the width of an 8B model."""

import pytest
import torch

import tqcompile
from tqcompile import backend, demo
from tqcompile.evaluate import perplexity
from tqcompile.modules import TwinLinear

pytestmark = pytest.mark.gpu
SCHEMES = ["twin-w4a4", "twin-w4a8", "twin-w4a16"]


@pytest.fixture(scope="module")
def tokenizer():
    return demo.load_tokenizer()


@pytest.fixture(scope="module")
def calibration(tokenizer):
    return demo.windows(tokenizer, demo.calibration_texts(160_000), 32)


def assert_every_op_runs_its_kernel():
    lowered = [choice for report in backend.reports for choice in report.lowered.values()]
    assert lowered
    assert {found.partition(":")[0] for found in lowered} == {"triton"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_perplexity_on_the_gpu_is_that_of_the_cpu(scheme, tokenizer, calibration):
    held_out = demo.held_out_windows(tokenizer, 16)
    on_cpu = tqcompile.compile(demo.load_model(), calibration, scheme=scheme, backend=None, progress=False)
    on_gpu = demo.load_model()
    # The same tensors, so that only the kernels differ.
    for name, layer in on_cpu.named_modules():
        if isinstance(layer, TwinLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(on_gpu.get_submodule(parent), leaf, TwinLinear(layer.spec))
    on_gpu.load_state_dict(on_cpu.state_dict())
    on_gpu = on_gpu.cuda().requires_grad_(False)
    reference, found = perplexity(on_cpu, held_out), perplexity(on_gpu, held_out)
    # Sums in another order make some activations round the other way. How far that alone moves the result shows
    # when the embeddings change in their last bit.
    embedding = on_gpu.get_input_embeddings().weight
    exact, moved = embedding.clone(), []
    for seed in range(4):
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed)).cuda()
        embedding.copy_(exact * (1 + 1e-7 * noise))
        moved.append(abs(perplexity(on_gpu, held_out) - found))
    print(f"{scheme}: perplexity {reference:.4f} on the CPU, {found:.4f} on the GPU, moved by {moved}")
    assert abs(found - reference) <= 4 * max(moved) + 1e-5 * reference


def test_generate_compiled_on_the_gpu(tokenizer, calibration):
    torch._dynamo.reset()
    backend.reports.clear()
    model = demo.load_model("cuda")
    windows = demo.held_out_windows(tokenizer, 16)
    full = perplexity(model, windows)
    tqcompile.compile(model, calibration, scheme="twin-w4a8", progress=False)  # "auto": compiled, as it is on a GPU
    ids = tokenizer("def add(a, b):", return_tensors="pt")["input_ids"].cuda()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    assert out.shape[1] > ids.shape[1]
    assert_every_op_runs_its_kernel()
    with torch.no_grad():
        compiled = model(input_ids=out, use_cache=False).logits
        with torch.compiler.set_stance("force_eager"):
            eager = model(input_ids=out, use_cache=False).logits
            assert perplexity(model, windows) < 1.05 * full
    # Inductor sums in another order, so a few quantized activations round the other way.
    assert (compiled - eager).norm() < 0.02 * eager.norm()


def test_static_cache_and_cuda_graphs_at_8b_width():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch._dynamo.reset()
    backend.reports.clear()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=2,
        vocab_size=32000,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 32000, (4, 256))
    tqcompile.compile(model, ids, scheme="twin-w4a8", rank=64, progress=False)
    prompt = torch.randint(0, 32000, (1, 40), device="cuda")
    options = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static"}
    first = model.generate(prompt, **options)
    assert first.shape == (1, 64)
    assert torch.equal(first, model.generate(prompt, **options))
    assert_every_op_runs_its_kernel()
    errors = [layer.error for layer in tqcompile.report(model).layers]
    assert max(errors) < 0.2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_lowered_model_is_the_portable_model(family, scheme):
    import transformers

    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_hidden_layers": 3,
        "vocab_size": 512,
    }
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    model = model.to(torch.bfloat16).eval()
    tqcompile.compile(model, torch.randint(0, 512, (4, 128)), scheme=scheme, rank=32, backend=None, progress=False)
    for shape in ((1, 1), (2, 5), (1, 40), (2, 300)):
        ids = torch.randint(0, 512, shape, device="cuda")
        results = {}
        for lower in (None, False):
            torch._dynamo.reset()
            backend.reports.clear()
            compiled = torch.compile(model, backend="twinquant", options={"quantize": False, "lower": lower})
            with torch.no_grad():
                results[lower] = compiled(ids, use_cache=False).logits.float()
            ops = [name.split("_default")[0] for name in backend.reports[-1].lowered]
            if lower is None:
                assert (ops.count("prologue"), ops.count("twin_gemm"), len(ops)) == (12, 12, 24)
            assert_every_op_runs_its_kernel()
        with torch.no_grad():
            exact = model(ids, use_cache=False).logits.float()
        # bf16 sums rounded elsewhere, and activations that round the other way for it: as far apart as the
        # portable graph is from the eager model.
        apart = (results[False] - exact).norm() / exact.norm()
        assert (results[None] - exact).norm() / exact.norm() <= 2 * apart + 1e-2
