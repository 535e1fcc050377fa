"""Model in, model out: the rotation of each attention head's channels moves into the value projection.

Attention mixes tokens and never channels, so with Q_g the rotation of key/value head g

    rows of v_proj (and bias):  Q_g^T W_v        columns of o_proj, of every query head of g:  W_o Q_g^-T

leave the model's function unchanged, and o_proj reads x~ = x Q at no cost. Requires an Absorber that the graph
proved to keep heads whole (find_absorbers). A diagonal scale s of the same site composes when it is absorbed
first: x~ = (x / s) Q.
"""

import torch
from torch import nn

from tqcompile.errors import ConfigError, PassError
from tqcompile.passes.block_rotation import as_blocks, inverse_transpose, rotate_columns, rotate_rows
from tqcompile.passes.plan import Absorber, Site
from tqcompile.passes.replace_linear import Journal


def refuse_head_rotation(site: Site) -> str:
    """Why the rotation of a site's heads cannot be absorbed; "" if it can."""
    if site.absorber is None:
        return site.reason or "no absorber"
    if site.absorber.kind != "attn_v":
        return f"{site.absorber.module} is no value projection: only attention's values are rotated by heads"
    return site.absorber.unrotatable


def rotate_value(
    absorber: Absorber, rotation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The value projection that makes x Q of x.

    Args:
        rotation: Q, (d, d) for all heads or (key/value heads, d, d); d is ``absorber.head_dim``. Blocks of a size b
            that divides d are also taken, as (b, b) or (key/value heads * d / b, b, b). Any invertible matrices are
            exact; orthogonal ones do not enlarge rounding errors.
        weight: (key/value heads * d, K); bias: (key/value heads * d,) or None.
    Returns:
        weight and bias, new tensors of the same dtypes.
    Raises:
        ConfigError: the rotation has a wrong shape, or is not finite.
    """
    blocks = _head_blocks(absorber, rotation, weight.shape[0])
    return rotate_rows(weight, blocks), None if bias is None else rotate_rows(bias, blocks)


def rotate_output(absorber: Absorber, rotation: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weight (N, query heads * d) of a linear that reads x Q where it read x: W Q^-T, a new tensor.

    rotation: as for :func:`rotate_value`; the query heads of one key/value head share its rotation.
    Raises:
        ConfigError: the rotation has a wrong shape, or is not invertible.
    """
    blocks = _head_blocks(absorber, rotation, weight.shape[1] // absorber.repeat)
    inverse = inverse_transpose(blocks, absorber.module)
    of_heads = inverse.unflatten(0, (-1, absorber.head_dim // inverse.shape[-1]))
    return rotate_columns(weight, of_heads.repeat_interleave(absorber.repeat, 0).flatten(0, 1))


def absorb_head_rotation(model: nn.Module, site: Site, rotation: torch.Tensor, journal: Journal) -> None:
    """Rotate the heads of ``site`` inside the model: its linears then read x Q, and the model's output is unchanged.

    rotation: as for :func:`rotate_value`. The journal remembers the parameters that are replaced.
    Raises:
        PassError: the graph does not prove it exact; the message has the reason.
        ConfigError: the rotation has a wrong shape, or is not invertible.
    """
    reason = refuse_head_rotation(site)
    if reason:
        raise PassError(f"absorb_head_rotation: {site.name}: {reason}. Rotate its input on-line instead.")
    absorber = site.absorber
    value = model.get_submodule(absorber.module)
    readers = [(name, model.get_submodule(name)) for name in site.linears]
    # All new tensors first: a rotation that is refused must not leave half a model rotated.
    outputs = [(name, rotate_output(absorber, rotation, linear.weight.detach())) for name, linear in readers]
    bias = None if value.bias is None else value.bias.detach()
    weight, bias = rotate_value(absorber, rotation, value.weight.detach(), bias)
    journal.set_parameter(f"{absorber.module}.weight", weight)
    if bias is not None:
        journal.set_parameter(f"{absorber.module}.bias", bias)
    for name, output in outputs:
        journal.set_parameter(f"{name}.weight", output)


def _head_blocks(absorber: Absorber, rotation: torch.Tensor, rows: int) -> torch.Tensor:
    what = f"head rotation in {absorber.module} (heads of {absorber.head_dim})"
    blocks = as_blocks(rotation, rows, what)
    if absorber.head_dim % blocks.shape[-1]:
        raise ConfigError(f"{what}: a rotation of {blocks.shape[-1]} channels would mix heads; it must divide a head")
    return blocks
