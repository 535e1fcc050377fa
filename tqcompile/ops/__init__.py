"""Custom ops: schema, fake and plain-torch reference. Importing this package registers them with torch."""

from tqcompile.ops.int8_linear import int8_linear, int8_linear_reference
from tqcompile.ops.lattice_linear import lattice_linear, lattice_linear_reference, mix_outputs
from tqcompile.ops.prologue import prologue, prologue_reference
from tqcompile.ops.quantize_activation import quantize_activation, quantize_activation_reference
from tqcompile.ops.twin_gemm import twin_gemm, twin_gemm_reference
from tqcompile.ops.twin_linear import twin_linear, twin_linear_reference, weight_only

__all__ = [
    "int8_linear",
    "int8_linear_reference",
    "lattice_linear",
    "lattice_linear_reference",
    "mix_outputs",
    "prologue",
    "prologue_reference",
    "quantize_activation",
    "quantize_activation_reference",
    "twin_gemm",
    "twin_gemm_reference",
    "twin_linear",
    "twin_linear_reference",
    "weight_only",
]
