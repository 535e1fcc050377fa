"""GPTQ's captured inner loop against the same loop launched step by step."""

import pytest
import torch

from tqcompile.methods import gptq

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("n", "k", "group_size", "grid"), [(70, 256, 32, False), (384, 512, 128, True)])
def test_the_captured_loop_gives_the_same_bytes(monkeypatch, n, k, group_size, grid):
    generator = torch.Generator().manual_seed(n)
    w, x = torch.randn(n, k, generator=generator).cuda(), torch.randn(2 * k, k, generator=generator).cuda()
    hessian = x.t() @ x
    factor = gptq.inverse_factor(hessian, "test")
    found = [gptq.gptq(w, factor, hessian.diagonal(), group_size, grid) for _ in range(2)]
    monkeypatch.setattr(gptq, "_captured", lambda *_: gptq._round_group)
    expected = gptq.gptq(w, factor, hessian.diagonal(), group_size, grid)
    assert expected[0].unique().numel() > 8
    for result in found:
        assert all(map(torch.equal, result, expected))
