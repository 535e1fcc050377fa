"""Random quantized linears in every form, for tests that do not care how the numbers were found."""

import torch

from tqcompile.methods.components import LinearSpec, QuantizedLinear
from tqcompile.ops.packing import pack_codes, pack_int4


def packed(rows: int, columns: int, groups: int, generator: torch.Generator, dtype=torch.bfloat16):
    """A random 4-bit matrix: packed (rows, columns/2) uint8 and scales (rows, groups)."""
    values = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).to(dtype)
    return pack_int4(values), scale


def random_components(
    n: int = 24,
    k: int = 64,
    rank: int = 8,
    group_size: int = 32,
    act_bits: int = 8,
    low_rank_bits: int = 4,
    block: int = 16,
    scaled: bool = True,
    bias: torch.dtype | None = torch.float32,
    seed: int = 0,
) -> QuantizedLinear:
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    tensors["residual.weight_packed"], tensors["residual.weight_scale"] = packed(n, k, k // group_size, g)
    if rank and low_rank_bits == 4:
        tensors["down.weight_packed"], tensors["down.weight_scale"] = packed(rank, k, k // group_size, g)
        tensors["up.weight_packed"], tensors["up.weight_scale"] = packed(n, rank, 1, g)
    elif rank:
        tensors["down"] = torch.randn(rank, k, generator=g).mul(0.1).bfloat16()
        tensors["up"] = torch.randn(n, rank, generator=g).mul(0.1).bfloat16()
    if scaled:
        tensors["transform.input_scale"] = torch.rand(k, generator=g) + 0.5
    if block:
        rotation = torch.linalg.qr(torch.randn(block, block, generator=g))[0].contiguous()
        tensors["transform.rotation"] = rotation.bfloat16()
    if bias is not None:
        tensors["bias"] = torch.randn(n, generator=g).to(bias)
    spec = LinearSpec(
        out_features=n,
        in_features=k,
        rank=rank,
        group_size=group_size,
        act_bits=act_bits,
        low_rank_bits=low_rank_bits,
        act_ratio=7 / (127 * 0.9) if act_bits == 4 else 0.0,
        rotation_block=block,
        scaled=scaled,
        bias_dtype=str(bias).removeprefix("torch.") if bias is not None else None,
    )
    return QuantizedLinear(spec, tensors)


def random_codes(
    n: int = 24,
    k: int = 96,
    bits: int = 2,
    rank: int = 0,
    group_size: int = 32,
    lattice: int = 0,
    basis: bool = False,
    signs: str = "",
    output_signs: str = "",
    scaled: bool = False,
    bias: torch.dtype | None = torch.float32,
    seed: int = 0,
) -> QuantizedLinear:
    """A linear with codes below four bits."""
    g = torch.Generator().manual_seed(seed)
    groups = k // group_size
    tensors = {
        "weight_codes": pack_codes(torch.randint(0, 1 << bits, (n, k), generator=g), bits),
        "weight_scale": (torch.rand(n, groups, generator=g) * 0.1 + 0.01).bfloat16(),
    }
    if lattice:
        tensors["weight_offset"] = torch.randn(lattice, generator=g)
    else:
        tensors["weight_zero"] = torch.randint(0, 32 << bits, (n, groups), generator=g, dtype=torch.uint8)
    if basis:
        tensors["transform.basis"] = torch.eye(lattice) + 0.2 * torch.randn(lattice, lattice, generator=g)
    if scaled:
        tensors["transform.input_scale"] = torch.rand(k, generator=g) + 0.5
    if output_signs:
        tensors["output_scale"] = (torch.rand(n, generator=g) + 0.5).bfloat16()
    if rank:
        tensors["down.weight_packed"], tensors["down.weight_scale"] = packed(rank, k, groups, g)
        tensors["up.weight_packed"], tensors["up.weight_scale"] = packed(n, rank, 1, g)
    if bias is not None:
        tensors["bias"] = torch.randn(n, generator=g).to(bias)
    spec = LinearSpec(
        out_features=n,
        in_features=k,
        rank=rank,
        group_size=group_size,
        act_bits=16,
        rotation_block=4 * len(signs),
        rotation_signs=signs,
        scaled=scaled,
        bias_dtype=str(bias).removeprefix("torch.") if bias is not None else None,
        weight_bits=bits,
        lattice=lattice,
        basis=basis,
        output_signs=output_signs,
    )
    return QuantizedLinear(spec, tensors)
