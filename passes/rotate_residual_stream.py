"""Model in, model out: an orthogonal rotation R of the residual stream, folded into every weight that touches it.

    embeddings:  E R            producers:  R^T W (and R^T b)        RMSNorms:  gain g -> 1
    linears that read a norm:   W diag(g) R

An RMSNorm without gain commutes with R, so the model's function is unchanged and the linears read rotated inputs at
no cost (QuaRot, arXiv 2404.00456; SpinQuant's R1, arXiv 2405.16406). Requires a ResidualStream that the graph proved
(find_residual_stream). The stream itself is rotated afterwards: hidden states that are asked for, or embeddings that
are passed in place of token ids, are those of the rotated model.

A head whose weight is the embedding's reads E R too, but needs E diag(g) R. Two ways are exact:
  "insert"  the final norm is followed by the matrix R^T diag(g) R: n R . R^T diag(g) R . (E R)^T = n diag(g) E^T
  "untie"   the head gets a weight of its own, and the config says so: the way to take when the head is quantized
"""

from collections.abc import Callable

import torch
from torch import nn

from tqcompile.errors import ConfigError, ModelError
from tqcompile.passes.block_rotation import as_blocks, nearest_orthogonal, rotate_columns, rotate_rows
from tqcompile.passes.plan import ResidualStream, StreamNorm
from tqcompile.passes.replace_linear import Journal, declare_untied

TIED_HEADS = ("insert", "untie")


class RotatedNorm(nn.Sequential):
    """A norm, and the matrix that follows it since the residual stream was rotated under a tied head."""


def rotate_residual_stream(
    model: nn.Module, stream: ResidualStream, rotation: torch.Tensor, journal: Journal, tied_head: str = "insert"
) -> tuple[str, ...]:
    """Fold ``rotation`` into the model; its output is unchanged, and the gain of every norm of the stream is 1.

    Args:
        rotation: R, (b, b) for all blocks of b channels, (channels / b, b, b), or b = channels for the whole stream.
            It is made exactly orthogonal first, so a rotation learned in float32 or a Hadamard matrix in bfloat16
            leaves the function unchanged too.
        journal: remembers the parameters, modules and settings that are replaced.
        tied_head: how a head that shares the embedding's weight is kept exact, one of TIED_HEADS.
    Returns:
        notes for the report: what the tied head costs.
    Raises:
        ConfigError: the rotation has a wrong shape or is not orthogonal, or tied_head is unknown.
        ModelError: the model is not the one that was analysed.
    """
    if tied_head not in TIED_HEADS:
        raise ConfigError(f"tied_head must be one of {', '.join(TIED_HEADS)}, got {tied_head!r}")
    what = f"residual stream of {stream.channels} channels"
    _require_same_model(model, stream)
    device = model.get_parameter(f"{stream.embeddings[0]}.weight").device
    blocks = nearest_orthogonal(as_blocks(rotation.to(device), stream.channels, what), what)
    notes: tuple[str, ...] = ()
    tied = stream.tied_head
    if tied and tied_head == "untie":
        notes, tied = (_untie(model, stream, journal),), ""
    tables = {id(model.get_parameter(f"{name}.weight")): f"{name}.weight" for name in stream.embeddings}
    for name in tables.values():
        _replace(model, journal, name, rotate_columns, blocks)  # and under its other names: a tied head's
    for norm in stream.norms:
        if tied in norm.linears and norm.module:
            notes = (_insert(model, stream, norm, blocks, journal),)
            folded = blocks
        else:
            folded = _fold_gain(model, norm, blocks, journal)
        for name in norm.linears:
            if name != tied:
                _replace(model, journal, f"{name}.weight", rotate_columns, folded)
    for name in stream.producers:
        _replace(model, journal, f"{name}.weight", rotate_rows, blocks)
        if getattr(model.get_submodule(name), "bias", None) is not None:
            _replace(model, journal, f"{name}.bias", rotate_rows, blocks)
    return notes


def insert_after_norm(model: nn.Module, norm: str, journal: Journal) -> nn.Linear:
    """Let a square linear without bias follow a norm: ``norm`` becomes RotatedNorm(norm, linear).

    The matrix is not initialised. A checkpoint of a model that was rotated with "insert" needs this structure to load.
    """
    module, weight = model.get_submodule(norm), model.get_parameter(f"{norm}.weight")
    size = weight.shape[0]
    linear = nn.utils.skip_init(nn.Linear, size, size, bias=False, device=weight.device, dtype=weight.dtype)
    linear.requires_grad_(weight.requires_grad)
    journal.replace(norm, RotatedNorm(module, linear).train(module.training))
    return linear


def rotated_norms(model: nn.Module) -> list[str]:
    """Names of the norms that a matrix follows: what a checkpoint has to say about a rotated model."""
    return [name for name, module in model.named_modules() if isinstance(module, RotatedNorm)]


def _replace(model: nn.Module, journal: Journal, name: str, rotate: Callable, blocks: torch.Tensor) -> None:
    journal.set_parameter(name, rotate(model.get_parameter(name).detach(), blocks))


def _fold_gain(model: nn.Module, norm: StreamNorm, blocks: torch.Tensor, journal: Journal) -> torch.Tensor:
    """Set the norm's gain to 1 and return diag(g) R, (n, b, b)."""
    if not norm.module:
        return blocks
    gain = model.get_parameter(f"{norm.module}.weight").detach()
    journal.set_parameter(f"{norm.module}.weight", torch.ones_like(gain))
    return gain.double().to(blocks.device).view(blocks.shape[0], -1, 1) * blocks


def _insert(model: nn.Module, stream: ResidualStream, norm: StreamNorm, blocks: torch.Tensor, journal: Journal) -> str:
    """Let R^T diag(g) R follow the norm, whose gain becomes 1: its readers then read n diag(g) R."""
    matrix = torch.block_diag(*(blocks.mT @ _fold_gain(model, norm, blocks, journal)))
    linear = insert_after_norm(model, norm.module, journal)
    with torch.no_grad():
        linear.weight.copy_(matrix.t())
    vocabulary = model.get_parameter(f"{stream.tied_head}.weight").shape[0]
    return (
        f"{stream.tied_head} is tied to {stream.embeddings[0]}: a {stream.channels} x {stream.channels} matrix follows "
        f"{norm.module} ({_bytes(linear.weight)} bytes, {100 * stream.channels / vocabulary:.2f}% of the head's FLOPs)"
    )


def _untie(model: nn.Module, stream: ResidualStream, journal: Journal) -> str:
    head = model.get_submodule(stream.tied_head)
    journal.assign_parameter(head, "weight", nn.Parameter(head.weight.detach(), head.weight.requires_grad))
    declare_untied(model, f"{stream.tied_head}.weight", journal)
    return (
        f"{stream.tied_head} was tied to {stream.embeddings[0]} and has its own weight now: "
        f"{_bytes(head.weight)} bytes more"
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _require_same_model(model: nn.Module, stream: ResidualStream) -> None:
    weights = {name: model.get_parameter(f"{name}.weight") for name in (*stream.embeddings, *stream.consumers)}
    tables = {id(weights[name]) for name in stream.embeddings}
    tied = [name for name in stream.consumers if id(weights[name]) in tables]
    if tied != ([stream.tied_head] if stream.tied_head else []):
        raise ModelError(
            f"rotate_residual_stream: tied to an embedding are {tied or 'no linears'}, and were "
            f"{stream.tied_head or 'none'} when the model was analysed. Analyse it again."
        )
