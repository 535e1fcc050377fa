"""Tiny random models and data for tests of the pipeline: hidden 128, two layers, group size 64, rank 16."""

import torch
from torch import nn

VOCABULARY = 97
SETTINGS = {"group_size": 64, "rank": 16, "steps": 3, "tune": 0, "progress": False, "backend": None}


def tiny(name: str, seed: int = 0, **changes) -> nn.Module:
    """A model of a transformers architecture, in eval mode, its norm gains and biases not trivial."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(seed)
    if name == "Bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**{**sizes, **changes}))
    else:
        sizes |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
        if name.startswith("Qwen3"):
            sizes["head_dim"] = 32
        config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # the usual 0.02 makes logits so flat that equal tokens would say little
            elif key.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 1:
                parameter.mul_(torch.rand_like(parameter) * 3 + 0.2)
    return model.eval()


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64 throughout: transformers' own RMSNorms compute in float32 whatever their dtype."""
    model = model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, norm)
    return model.eval()


def as_bfloat16(model: nn.Module) -> nn.Module:
    """The model with bfloat16 parameters, as ``from_pretrained(dtype=torch.bfloat16)`` gives it: buffers as they are.

    (``model.to(torch.bfloat16)`` also rounds the rotary frequencies, which no checkpoint stores.)
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


def tokens(rows: int = 24, length: int = 12, seed: int = 1) -> torch.Tensor:
    """(rows, length) int64 token ids."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_orthogonal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Orthogonal matrices (*shape, shape[-1]) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64))[0]


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of a transformers model for ids (B, S), by default fresh ones."""
    ids = tokens(3, 9, seed=7) if ids is None else ids
    with torch.no_grad():
        return model(input_ids=ids).logits


def snapshot(model: nn.Module) -> dict:
    """Everything a failed compile must leave alone, as values that compare with ``==``."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        "gradients": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
        "attributes": sorted(vars(model)),
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    for key in ("modules", "gradients", "hooks", "attributes"):
        assert after[key] == before[key], key
    assert list(after["state"]) == list(before["state"])
    for name, tensor in before["state"].items():
        # Bytes, so that NaN equals NaN and -0.0 differs from 0.0.
        now = after["state"][name]
        assert now.dtype == tensor.dtype, name
        assert torch.equal(now.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
