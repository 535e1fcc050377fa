"""Model in, model out: transformers' ``Conv1D`` (GPT-2), a linear with its weight (K, N), becomes an ``nn.Linear``.

Exact. The journal undoes it; what is not quantized afterwards is put back, so that the rest of a checkpoint keeps the
names and shapes of the original.
"""

from torch import nn

from tqcompile.passes.replace_linear import Journal


def is_conv1d(module: object) -> bool:
    """Whether a module is a ``transformers.pytorch_utils.Conv1D``, by its form: transformers need not be imported."""
    return isinstance(module, nn.Module) and type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def as_linear(module: nn.Module) -> nn.Linear:
    """The linear (N, K) that computes what a Conv1D with weight (K, N) does. The bias is shared, the weight a copy."""
    k, n = module.weight.shape
    linear = nn.Linear(k, n, bias=module.bias is not None, device="meta", dtype=module.weight.dtype)
    linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), module.weight.requires_grad)
    linear.bias = module.bias
    return linear.train(module.training)


def replace_conv1d(model: nn.Module, journal: Journal) -> dict[str, nn.Module]:
    """Replace every Conv1D whose weight no other module has. Returns name -> the Conv1D that was there."""
    modules = {name: module for name, module in model.named_modules() if is_conv1d(module)}
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    found = {name: module for name, module in modules.items() if counts[id(module.weight)] == 1}
    for name, module in found.items():
        journal.replace(name, as_linear(module))
    return found


def restore_conv1d(model: nn.Module, found: dict[str, nn.Module], journal: Journal) -> None:
    """Put back those that are still plain linears."""
    for name, module in found.items():
        if type(model.get_submodule(name)) is nn.Linear:
            journal.replace(name, module)
