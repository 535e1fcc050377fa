"""Codes below four bits: their layout, ``lattice_linear`` against float64, and the layer made of it."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import assert_unchanged, logits, snapshot, tiny, tokens

import tqcompile
from tqcompile import ops
from tqcompile.config import LOW_BIT_SCHEMES, Config, Scheme
from tqcompile.errors import CheckpointError
from tqcompile.methods.low_bit import solve_site
from tqcompile.methods.twin import SiteProblem
from tqcompile.modules import LatticeLinear
from tqcompile.ops.packing import pack_codes, unpack_codes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SETTINGS = {"group_size": 64, "tune": 0, "progress": False, "backend": None}


def bit_by_bit(packed, bits, k):
    """(N, K) codes, read as the format describes it, one bit at a time."""
    rows = np.unpackbits(packed.numpy(), axis=1, bitorder="little")
    codes = np.zeros((len(rows), k), dtype=np.int64)
    for j in range(k):
        codes[:, j] = rows[:, 2 * j] + 2 * rows[:, 2 * j + 1]
        if bits == 3:
            codes[:, j] += 4 * rows[:, 2 * k + j]
    return codes


@pytest.mark.parametrize("bits", [2, 3])
def test_codes_are_packed_as_documented(bits):
    codes = torch.randint(0, 1 << bits, (7, 96))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (7, 96 * bits // 8)
    assert (bit_by_bit(packed, bits, 96) == codes.numpy()).all()
    assert torch.equal(unpack_codes(packed, bits), codes.to(torch.uint8))


def test_what_does_not_fit_is_not_packed():
    with pytest.raises(ValueError, match="columns"):
        pack_codes(torch.zeros(2, 36, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="4 bits"):
        pack_codes(torch.zeros(2, 32, dtype=torch.long), 4)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match="lie in"):
            pack_codes(torch.full((2, 32), wrong), 2)


def arguments(shape, dtype, bits, n=33, groups=3, zero=True, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = shape[-1]
    codes = torch.randint(0, 256, (n, k * bits // 8), generator=g, dtype=torch.uint8)
    scale = (torch.rand(n, groups, generator=g) * 0.1 + 0.01).to(torch.bfloat16)
    zeros = torch.randint(0, 32 * (1 << bits), (n, groups), generator=g, dtype=torch.uint8) if zero else None
    offset = None if zero else torch.randn(4, generator=g)
    x = torch.randn(shape, generator=g).to(dtype)
    return x, codes, scale, zeros, offset, torch.randn(n, generator=g) if bias else None, bits


def exact(x, codes, scale, zero, offset, bias, bits):
    """float64 result and the sum of magnitudes behind it."""
    k, x = x.shape[-1], x.double().numpy()
    w = bit_by_bit(codes, bits, k).astype(np.float64)
    groups = scale.shape[1]
    if zero is not None:
        w -= np.repeat(zero.double().numpy() / 32, k // groups, axis=1)
    if offset is not None:
        w += np.tile(offset.double().numpy(), k // len(offset))
    w *= np.repeat(scale.double().numpy(), k // groups, axis=1)
    y = x @ w.T + (0 if bias is None else bias.double().numpy())
    return y, np.abs(x) @ np.abs(w).T + 1


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("zero", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_lattice_linear_is_the_formula(bits, dtype, zero, bias):
    args = arguments((3, 5, 96), dtype, bits, zero=zero, bias=bias)
    torch.library.opcheck(ops.lattice_linear, args)
    y, size = exact(*args)
    found = ops.lattice_linear(*args)
    assert found.dtype == dtype
    assert (np.abs(found.double().numpy() - y) <= EPS[dtype] * np.abs(y) + 1e-5 * size).all()


def test_lattice_linear_refuses_what_does_not_fit():
    x, codes, scale, zero, _, bias, bits = arguments((3, 96), torch.float32, 2)
    for wrong in (
        (x.int(), codes, scale, zero, None, bias, bits),
        (x, codes, scale, zero, None, bias, 3),
        (x, codes.to(torch.int8), scale, zero, None, bias, bits),
        (x, codes, scale[:5], zero, None, bias, bits),
        (x, codes, scale, zero[:, :1], None, bias, bits),
        (x, codes, scale, None, torch.zeros(5), bias, bits),
        (x, codes, scale, zero, None, bias[:3], bits),
    ):
        fake = torch._subclasses.FakeTensorMode()
        with fake, pytest.raises(RuntimeError):
            ops.lattice_linear(*(fake.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in wrong))


def layer_of(scheme, n=64, k=128, seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(n, k, generator=g), torch.randn(n, generator=g)
    problem = SiteProblem([weight], [bias], None, Scheme.parse(scheme), Config(scheme=scheme, group_size=64))
    quantized = solve_site(problem).quantized[0]
    return LatticeLinear.from_quantized(quantized), weight, bias


@pytest.mark.parametrize("scheme", LOW_BIT_SCHEMES)
def test_the_layer_is_close_to_the_linear_and_keeps_its_dtypes(scheme):
    layer, weight, bias = layer_of(scheme)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))
    wanted, y = torch.nn.functional.linear(x, weight, bias), layer(x)
    assert (y - wanted).norm() < (0.3 if "w3" in scheme else 0.7) * wanted.norm()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    half = copy.deepcopy(layer).bfloat16()
    for name, tensor in half.state_dict().items():
        assert name == "bias" or torch.equal(tensor, state[name])
    assert (half(x.bfloat16()).float() - y).norm() < 0.03 * y.norm()
    fresh = LatticeLinear(layer.spec)
    fresh.load_state_dict(state)
    fresh.rebuild()
    assert torch.equal(fresh(x), y)
    assert f"weight_bits={layer.spec.weight_bits}" in repr(layer)


@pytest.mark.parametrize("signs", ["", "a5c3"])
def test_a_basis_moves_to_the_activations(signs):
    layer, _, _ = layer_of("unisvq-w2a16", k=64)
    g = torch.Generator().manual_seed(3)
    spec = copy.deepcopy(layer.spec)
    spec = type(spec)(**{**spec.to_dict(), "basis": True, "rotation_signs": signs, "rotation_block": 4 * len(signs)})
    basis = torch.randn(4, 4, generator=g)
    own = {**layer.state_dict(), "transform.basis": basis}
    moved = LatticeLinear.from_quantized(type("Q", (), {"spec": spec, "tensors": own})())
    x = torch.randn(5, 64, generator=g)
    # T on the weights' side, in float64: w = scale T (code + offset), for each 4 columns.
    points = unpack_codes(own["weight_codes"], 2).double().reshape(64, 16, 4) + own["weight_offset"].double()
    w = (points @ basis.double().t()).reshape(64, 1, 64) * own["weight_scale"].double()[:, :, None]
    from tqcompile.methods.hadamard import rotate_blocks, signed_hadamard

    h = rotate_blocks(x.double(), signed_hadamard(signs).double()) if signs else x.double()
    y = h @ w.reshape(64, 64).t()
    if spec.output_signs:
        y = rotate_blocks(y, signed_hadamard(spec.output_signs).double()) * own["output_scale"].double()
    y = y + own["bias"].double()
    assert ((moved(x) - y).norm() / y.norm()) < 4e-3  # the product of both matrices is rounded to bfloat16


@pytest.mark.parametrize("scheme", ["d2-w3a16", "twin-w2a16", "unisvq-w2a16", "gptq-w3a16"])
def test_compile_save_load_and_report(scheme, tmp_path):
    model = tiny("Qwen3")
    tqcompile.compile(model, tokens(), scheme=scheme, **{**SETTINGS, "tune": 3})
    layers = [m for m in model.modules() if isinstance(m, LatticeLinear)]
    assert len(layers) == 14
    report = tqcompile.report(model)
    stored = sum(8 * t.numel() * t.element_size() for m in layers for n, t in m.state_dict().items() if n != "bias")
    weights = sum(m.in_features * m.out_features for m in layers)
    assert report.bits_per_weight == pytest.approx(stored / weights)
    assert {record.scheme for record in report.layers} == {scheme}
    assert all(0 < record.error < 1 for record in report.layers)
    corrected = [n for n, _ in model.named_parameters() if n.endswith(".shift")]
    assert len(corrected) == (2 if scheme.startswith(("d2", "twin")) else 0)
    tqcompile.save(model, tmp_path / "m")
    again = tqcompile.load(tmp_path / "m")
    assert torch.equal(logits(again), logits(model))
    assert str(tqcompile.report(again)) == str(report)
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"lattice": ', '"lattice": 3'))
    with pytest.raises(CheckpointError, match="impossible layer description"):
        tqcompile.load(tmp_path / "m")


@pytest.mark.parametrize("scheme", ["d2-w2a16", "unisvq-w2a16", "twin-w2a16"])
def test_the_backend_runs_compiled_models_and_quantizes_plain_ones(scheme):
    model = tiny("Qwen3")
    tqcompile.compile(model, tokens(), scheme=scheme, **SETTINGS)
    expected = logits(model)
    model.compile(backend="twinquant", options={"inner": "eager", "quantize": False})
    assert torch.equal(logits(model), expected)
    from tqcompile.backend import reports

    ops_of_a_layer = 3 if scheme.startswith("twin") else 1
    assert list(reports[-1].lowered.values()) == ["reference: there is no kernel for device cpu"] * 14 * ops_of_a_layer
    torch._dynamo.reset()
    # Made for a GPU, q/k/v are one product, and gate/up: the transform is the same, so it is applied once.
    model.compile(backend="twinquant", options={"inner": "eager", "quantize": False, "lower": True})
    assert torch.equal(logits(model), expected)
    assert reports[-1].modified["merge_siblings"]
    if not scheme.startswith("twin"):
        prologues = sum(name.startswith("prologue") for name in reports[-1].lowered)
        # In front of every product that has a transform, a norm or a gate before it: d2's o_proj has none of them.
        assert prologues == (8 if scheme.startswith("unisvq") else 6)
        assert len(reports[-1].lowered) == 8 + prologues
    torch._dynamo.reset()
    plain = tiny("Qwen3").requires_grad_(False)
    exact_logits = logits(plain)
    plain.compile(backend="twinquant", options={"inner": "eager", "scheme": scheme, "group_size": 64})
    found = logits(plain)
    assert not torch.equal(found, exact_logits)
    assert len(reports[-1].quantized) == 14
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", ["d2-w2a16", "unisvq-w2a16"])
def test_attached_components_run_in_the_backend(scheme):
    model = tiny("Qwen2").requires_grad_(False)
    before = snapshot(model)
    settings = {name: value for name, value in SETTINGS.items() if name != "backend"}
    report = tqcompile.attach_recipe(model, tokens(), scheme=scheme, **settings)
    assert_unchanged(model, before)
    if scheme.startswith("d2"):
        assert any("the mean of no norm was corrected" in note for note in report.notes)
    model.compile(backend="twinquant", options={"inner": "eager"})
    with torch.no_grad():
        found = logits(model)
    from tqcompile.backend import reports

    assert set(reports[-1].quantized.values()) == {"attached"}
    assert torch.isfinite(found).all()
    torch._dynamo.reset()
