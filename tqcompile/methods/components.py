"""The result of quantizing one linear: a static description and the tensors it names."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """Everything about a quantized linear that is not a tensor; stored as JSON in a checkpoint.

    out_features N, in_features K, rank R (0: no low-rank component), group_size g (divides K).
    act_bits: 4, 8, or 16 for activations that are not quantized. low_rank_bits: 4, or 16 (dense bfloat16).
    act_ratio: 0, or the factor from the 8-bit to the 4-bit activation (see ops/twin_linear.py).
    rotation_block: b of the on-line (b, b) rotation, 0 for none. rotation_signs: the b signs of a signed Hadamard
    rotation as hex digits, so that the matrix need not be stored; "" for any other matrix.
    scaled: an on-line (K,) input scale exists.
    bias_dtype: torch dtype name of the bias, or None.
    weight_bits: 4; 2 or 3 for a ``LatticeLinear`` (act_bits 16, any rotation a signed Hadamard, a low rank only
        without a lattice); or 8 for an
        output head that is only rounded to int8 (rank 0, act_bits 16, no transform).
    lattice: d of the lattice that a ``LatticeLinear``'s codes are on, or 0 for a zero point a group.
    basis: whether the lattice has a basis T other than the identity.
    output_signs: signs of the Hadamard rotation of the result, as hex digits; "" for none.
    """

    out_features: int
    in_features: int
    rank: int
    group_size: int
    act_bits: int
    low_rank_bits: int = 4
    act_ratio: float = 0.0
    rotation_block: int = 0
    rotation_signs: str = ""
    scaled: bool = False
    bias_dtype: str | None = None
    weight_bits: int = 4
    lattice: int = 0
    basis: bool = False
    output_signs: str = ""

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class QuantizedLinear:
    """A LinearSpec and its tensors, keyed as in the ``state_dict`` of ``TwinLinear``.

    residual.weight_packed (N, K/2) uint8, residual.weight_scale (N, K/g) bfloat16; with low_rank_bits 4 also
    down.weight_packed (R, K/2), down.weight_scale (R, K/g), up.weight_packed (N, R/2), up.weight_scale (N, 1);
    with 16 dense ``down`` (R, K) and ``up`` (N, R) bfloat16; transform.input_scale (K,), transform.rotation
    (b, b) bfloat16, bias (N,) where they exist. With ``weight_bits`` 8: weight_int8 (N, K),
    weight_scale (N, K/g) bfloat16, bias. With 2 or 3: weight_codes (N, K * bits / 8) uint8, weight_scale (N, K/g)
    bfloat16, weight_zero (N, K/g) uint8 or weight_offset (d,) float32 (``lattice``), transform.basis (d, d) float32,
    output_scale (N,) bfloat16 (``output_signs``), transform.input_scale (K,), bias, and down and up as above.
    """

    spec: LinearSpec
    tensors: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        # Files and kernels take whole rows; a factor that was a transposed matrix packs to a transposed one.
        self.tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}


def are_signs(signs: object, block: int) -> bool:
    """Whether ``signs`` are the hex digits of a signed Hadamard of ``block`` channels, or "" for none."""
    if signs == "":
        return True
    hexadecimal = isinstance(signs, str) and set(signs) <= set("0123456789abcdef")
    return hexadecimal and 4 * len(signs) == block and block & (block - 1) == 0


def lattice_fits(spec: LinearSpec) -> bool:
    """Whether the fields for codes below four bits fit each other and the rest."""
    if spec.weight_bits > 3:
        return (spec.lattice, spec.basis, spec.output_signs) == (0, False, "")
    return (
        spec.act_bits == 16
        and (spec.rank == 0 or (spec.low_rank_bits == 4 and spec.lattice == 0 and spec.output_signs == ""))
        and spec.in_features % 32 == 0
        and isinstance(spec.lattice, int)
        and (spec.lattice == 0 or (0 < spec.lattice <= 8 and spec.group_size % spec.lattice == 0))
        and isinstance(spec.basis, bool)
        and not (spec.basis and not spec.lattice)
        and (spec.rotation_block == 0) == (spec.rotation_signs == "")
        and (not spec.basis or spec.rotation_block % spec.lattice == 0)
        and isinstance(spec.output_signs, str)
        and are_signs(spec.output_signs, 4 * len(spec.output_signs))
        and (not spec.output_signs or spec.out_features % (4 * len(spec.output_signs)) == 0)
    )
