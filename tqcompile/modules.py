"""The quantized layer: plain buffers and two ops, so it runs, saves, exports and compiles like any module."""

import torch
from torch import nn

from tqcompile import ops
from tqcompile.methods.components import LinearSpec, QuantizedLinear
from tqcompile.methods.hadamard import signed_hadamard
from tqcompile.methods.lattice import input_rotation
from tqcompile.ops.quantize_activation import transform_activation


class _FixedDtype(nn.Module):
    """Buffers keep their dtypes under ``.half()`` or ``.to(dtype)``: rounding a scale would change every weight."""

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class PackedWeight(_FixedDtype):
    """One 4-bit matrix. Buffers: weight_packed (N, K/2) uint8, weight_scale (N, K/g) bfloat16."""

    def __init__(self, rows: int, columns: int, groups: int, device=None):
        super().__init__()
        self.register_buffer("weight_packed", torch.empty(rows, columns // 2, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.empty(rows, groups, dtype=torch.bfloat16, device=device))


class Transform(_FixedDtype):
    """What stays on-line in front of a layer. Buffers: input_scale (K,) float32, rotation (b, b) bfloat16; or None.

    A signed Hadamard rotation is rebuilt from its signs and takes no room in a checkpoint.
    """

    def __init__(self, spec: LinearSpec, device=None):
        super().__init__()
        self.signs, b = spec.rotation_signs, spec.rotation_block
        scale = torch.empty(spec.in_features, dtype=torch.float32, device=device) if spec.scaled else None
        rotation = torch.empty(b, b, dtype=torch.bfloat16, device=device) if b else None
        self.register_buffer("input_scale", scale)
        self.register_buffer("rotation", rotation, persistent=not self.signs)
        if device != "meta":
            self.rebuild(device)

    def rebuild(self, device=None) -> None:
        """Recompute a rotation that is not stored, after loading."""
        if self.signs:
            self.rotation = signed_hadamard(self.signs).to(device)


class TwinLinear(_FixedDtype):
    """Replaces ``nn.Linear``: transform, quantize the activation, residual plus low-rank component, bias.

    The tensors are described by :class:`tqcompile.methods.components.LinearSpec`; x is (..., K), the result (..., N)
    in the dtype of x. ``low_rank_bits == 16`` keeps the factors dense (the SVDQuant comparator), which costs two
    more matrix products beside the fused op.
    """

    def __init__(self, spec: LinearSpec, device=None):
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        n, k, r = spec.out_features, spec.in_features, spec.rank
        groups = k // spec.group_size
        self.transform = Transform(spec, device)
        self.residual = PackedWeight(n, k, groups, device)
        if r and spec.low_rank_bits == 4:
            self.down = PackedWeight(r, k, groups, device)
            self.up = PackedWeight(n, r, 1, device)
        elif r:
            self.register_buffer("down", torch.empty(r, k, dtype=torch.bfloat16, device=device))
            self.register_buffer("up", torch.empty(n, r, dtype=torch.bfloat16, device=device))
        bias = torch.empty(n, dtype=getattr(torch, spec.bias_dtype), device=device) if spec.bias_dtype else None
        self.register_buffer("bias", bias)

    @staticmethod
    def from_quantized(quantized: QuantizedLinear) -> "TwinLinear":
        """A layer that holds the tensors of ``quantized``, on their device."""
        layer = TwinLinear(quantized.spec, device="meta")
        state = {name: quantized.tensors[name] for name in layer.state_dict()}
        layer.load_state_dict(state, strict=True, assign=True)
        layer.rebuild()
        return layer

    def rebuild(self) -> None:
        """Recompute what is not stored, after loading."""
        self.transform.rebuild(self.residual.weight_packed.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spec, transform = self.spec, self.transform
        if spec.act_bits == 16:
            dense = operand = transform_activation(x, transform.input_scale, transform.rotation)
            scale = None
        else:
            operand, scale = ops.quantize_activation(x, transform.input_scale, transform.rotation)
        twin = spec.rank and spec.low_rank_bits == 4
        y = ops.twin_linear(
            operand,
            scale,
            self.residual.weight_packed,
            self.residual.weight_scale,
            self.down.weight_packed if twin else None,
            self.down.weight_scale if twin else None,
            self.up.weight_packed if twin else None,
            self.up.weight_scale if twin else None,
            self.bias,
            spec.act_ratio,
            x.dtype,
        )
        if spec.rank and not twin:
            if spec.act_bits != 16:
                dense = transform_activation(x, transform.input_scale, transform.rotation)
            y = y + nn.functional.linear(nn.functional.linear(dense, self.down.to(x.dtype)), self.up.to(x.dtype))
        return y

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"in_features={s.in_features}, out_features={s.out_features}, rank={s.rank}, "
            f"group_size={s.group_size}, act_bits={s.act_bits}"
        )


class Int8Linear(_FixedDtype):
    """A linear layer with 8-bit weights: weight_int8 (N, K) int8, weight_scale (N, K/g) bfloat16, bias (N,) or None."""

    def __init__(self, spec: LinearSpec, device=None):
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        n, k = spec.out_features, spec.in_features
        scales = (n, k // spec.group_size)
        bias = torch.empty(n, dtype=getattr(torch, spec.bias_dtype), device=device) if spec.bias_dtype else None
        self.register_buffer("weight_int8", torch.empty(n, k, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(scales, dtype=torch.bfloat16, device=device))
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.int8_linear(x, self.weight_int8, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        s = self.spec
        return f"in_features={s.in_features}, out_features={s.out_features}, group_size={s.group_size}"


class LatticeTransform(_FixedDtype):
    """What stays on-line in front of a ``LatticeLinear``. Buffers: input_scale (K,), basis T (d, d) float32; or None.

    ``rotation`` (b, b) bfloat16 is not stored: the signed Hadamard, and T for every d of its columns.
    """

    def __init__(self, spec: LinearSpec, device=None):
        super().__init__()
        self.signs, d, b = spec.rotation_signs, spec.lattice, spec.rotation_block or (spec.lattice * spec.basis)
        scale = torch.empty(spec.in_features, dtype=torch.float32, device=device) if spec.scaled else None
        self.register_buffer("input_scale", scale)
        basis = torch.empty(d, d, dtype=torch.float32, device=device) if spec.basis else None
        self.register_buffer("basis", basis)
        rotation = torch.empty(b, b, dtype=torch.bfloat16, device=device) if b else None
        self.register_buffer("rotation", rotation, persistent=False)

    def rebuild(self, device=None) -> None:
        """Recompute what is not stored, after loading."""
        rotation = input_rotation(self.signs, self.basis)
        self.rotation = None if rotation is None else rotation.to(device)


class LatticeLinear(_FixedDtype):
    """A linear layer with 2-bit or 3-bit codes: transform, ``lattice_linear``, and the rotation of the result or the
    4-bit low rank beside it, if any.

    Buffers: see :class:`tqcompile.methods.components.QuantizedLinear`; x is (..., K), the result (..., N) in the dtype
    of x.
    """

    def __init__(self, spec: LinearSpec, device=None):
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = n_in, n_out = spec.in_features, spec.out_features
        groups = n_in // spec.group_size

        def buffer(name: str, present: bool, *shape: int, dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device) if present else None)

        self.transform = LatticeTransform(spec, device)
        buffer("weight_codes", True, n_out, n_in * spec.weight_bits // 8, dtype=torch.uint8)
        buffer("weight_scale", True, n_out, groups, dtype=torch.bfloat16)
        buffer("weight_zero", not spec.lattice, n_out, groups, dtype=torch.uint8)
        buffer("weight_offset", spec.lattice > 0, spec.lattice, dtype=torch.float32)
        buffer("output_scale", bool(spec.output_signs), n_out, dtype=torch.bfloat16)
        buffer("bias", spec.bias_dtype is not None, n_out, dtype=getattr(torch, spec.bias_dtype or "float32"))
        self.register_buffer("output_rotation", None, persistent=False)
        if spec.rank:
            self.down = PackedWeight(spec.rank, n_in, groups, device)
            self.up = PackedWeight(n_out, spec.rank, 1, device)

    @staticmethod
    def from_quantized(quantized: QuantizedLinear) -> "LatticeLinear":
        """A layer that holds the tensors of ``quantized``, on their device."""
        layer = LatticeLinear(quantized.spec, device="meta")
        state = {name: quantized.tensors[name] for name in layer.state_dict()}
        layer.load_state_dict(state, strict=True, assign=True)
        layer.rebuild()
        return layer

    def rebuild(self) -> None:
        """Recompute what is not stored, after loading."""
        device = self.weight_codes.device
        self.transform.rebuild(device)
        signs = self.spec.output_signs
        self.output_rotation = signed_hadamard(signs).to(device) if signs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        transform, mixed = self.transform, self.output_rotation is not None
        u = transform_activation(x, transform.input_scale, transform.rotation)
        y = ops.lattice_linear(
            u,
            self.weight_codes,
            self.weight_scale,
            self.weight_zero,
            self.weight_offset,
            None if mixed else self.bias,
            self.spec.weight_bits,
        )
        if self.spec.rank:
            down, up = self.down, self.up
            t = ops.weight_only(u, down.weight_packed, down.weight_scale)
            y = y + ops.weight_only(t, up.weight_packed, up.weight_scale)
        return ops.mix_outputs(y, self.output_rotation, self.output_scale, self.bias) if mixed else y

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"in_features={s.in_features}, out_features={s.out_features}, weight_bits={s.weight_bits}, "
            f"group_size={s.group_size}, lattice={s.lattice}"
        )


QUANTIZED = (TwinLinear, LatticeLinear, Int8Linear)


def empty_layer(spec: LinearSpec, device=None) -> TwinLinear | LatticeLinear | Int8Linear:
    """The layer that ``spec`` describes, its tensors not yet filled."""
    kind = Int8Linear if spec.weight_bits == 8 else LatticeLinear if spec.weight_bits < 4 else TwinLinear
    return kind(spec, device=device)


def filled_layer(quantized: QuantizedLinear) -> TwinLinear | LatticeLinear:
    """The layer that holds the tensors of ``quantized``, on their device."""
    return (LatticeLinear if quantized.spec.weight_bits < 4 else TwinLinear).from_quantized(quantized)
