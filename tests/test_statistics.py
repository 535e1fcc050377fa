"""What is kept of a site's input."""

import pytest
import torch

from tqcompile.methods.statistics import HELD_OUT_ROWS, ROWS, StatisticsCollector, balance_tokens


def rows(t, k=9, seed=0):
    return torch.randn(t, k, generator=torch.Generator().manual_seed(seed))


def test_second_moments_and_ranges_of_the_training_rows_only():
    collector = StatisticsCollector(9, "cpu", 3, 1)
    first, second, held = rows(5), rows(11, seed=1), rows(7, seed=2) * 100
    collector.add(first, held_out=False)
    collector.add(second, held_out=False)
    collector.add(held, held_out=True)
    found = collector.finish()
    x = torch.cat([first, second]).double()
    # A sum of 16 float32 products.
    assert torch.allclose(found.hessian.double(), x.t() @ x, rtol=0, atol=16 * 2.0**-24 * (x.abs().t() @ x.abs()).max())
    assert torch.equal(found.absmax.double(), x.abs().amax(0))
    assert found.tokens == 16
    assert torch.equal(found.rows, torch.cat([first, second]))
    assert torch.equal(found.held_out, held)


@pytest.mark.parametrize(("batches", "held", "length"), [(1, 0, 5000), (8, 1, 700), (40, 5, 513), (3, 1, 2)])
def test_rows_are_a_bounded_sample_that_spans_every_batch(batches, held, length):
    collector = StatisticsCollector(2, "cpu", batches, held)
    for batch in range(batches):
        numbers = torch.arange(length).float()
        collector.add(torch.stack([numbers, torch.full((length,), float(batch))], 1), held_out=batch >= batches - held)
    found = collector.finish()
    # Every batch gives the same number of rows, rounded up.
    assert len(found.rows) <= ROWS + batches
    assert len(found.held_out) <= (HELD_OUT_ROWS + batches if held else ROWS)
    assert set(found.rows[:, 1].tolist()) == {float(b) for b in range(batches - held)}
    first = found.rows[found.rows[:, 1] == 0, 0]
    assert first[0] == 0
    assert first[-1] == length - 1
    assert (first.diff() > 0).all()
    if held:
        assert set(found.held_out[:, 1].tolist()) == {float(b) for b in range(batches - held, batches)}
    else:
        assert torch.equal(found.held_out, found.rows)


def test_batches_without_rows_count_for_nothing():
    collector = StatisticsCollector(9, "cpu", 3, 1)
    collector.add(rows(0), held_out=False)
    collector.add(rows(4), held_out=False)
    collector.add(rows(0), held_out=True)
    found = collector.finish()
    assert found.tokens == 4
    # No row is held out: errors are then measured on the training rows, not on nothing.
    assert torch.equal(found.held_out, rows(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_kept_in_float32(dtype):
    collector = StatisticsCollector(9, "cpu", 1, 0)
    x = rows(6).to(dtype).requires_grad_()
    collector.add(x, held_out=False)
    found = collector.finish()
    for tensor in (found.hessian, found.absmax, found.rows, found.held_out):
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad


def test_balanced_tokens_have_bounded_norms_and_keep_their_directions():
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    x[7] *= 1e4
    x[8] *= 1e-4
    x[9] = 0
    y = balance_tokens(x)
    energy = y.square().mean(1)
    assert (energy <= 1 + 1e-5).all()
    assert energy[7] > 0.99
    assert energy[8] < 1e-5
    assert torch.equal(y[9], torch.zeros(16))
    expected = x[:9] / x[:9].norm(dim=1, keepdim=True)
    assert (y[:9] / y[:9].norm(dim=1, keepdim=True) - expected).abs().max() < 1e-5
    assert torch.allclose(balance_tokens(x * 3.0), y, rtol=1e-5)
    assert torch.equal(balance_tokens(torch.zeros(4, 8)), torch.zeros(4, 8))


def test_a_balanced_collector_balances_training_rows_and_leaves_held_out_rows():
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 31)[:, None]
    collector = StatisticsCollector(8, "cpu", 2, 1, balanced=True)
    collector.add(x, held_out=False)
    collector.add(x, held_out=True)
    found, y = collector.finish(), balance_tokens(x)
    assert found.balanced
    assert torch.equal(found.rows, y)
    assert torch.equal(found.held_out, x)
    assert torch.allclose(found.hessian, y.t() @ y, rtol=1e-5)
    assert torch.equal(found.absmax, y.abs().amax(0))
