"""The cost of what stays on-line, against counting the multiplications and additions."""

import pytest

from tqcompile.errors import ConfigError
from tqcompile.passes.online_cost import OnlineCost, online_cost, total_cost


def counted(shapes, block, scaled):
    """FLOPs of y = W (Q^T (x / s)), counted one output element at a time."""
    k = shapes[0][1]
    transforms = sum(2 * block for _ in range(k) if block) + sum(1 for _ in range(k) if scaled)
    linears = sum(2 * k for n, _ in shapes for _ in range(n))
    return transforms, linears


@pytest.mark.parametrize("shapes", [[(96, 64)], [(64, 48), (16, 48), (16, 48)], [(7, 32), (1, 32)]], ids=str)
@pytest.mark.parametrize("block", [0, 8, 16])
@pytest.mark.parametrize("scaled", [True, False])
def test_one_site(shapes, block, scaled):
    cost = online_cost(shapes, block, scaled)
    assert (cost.flops, cost.site_flops) == counted(shapes, block, scaled)
    assert cost.percent == pytest.approx(100 * cost.flops / cost.site_flops)


def test_a_llama_3_8b_layer():
    # 128 / 6144 for q/k/v, 128 / 28672 for gate/up, 128 / 4096 for down: worked out by hand.
    qkv = online_cost([(4096, 4096), (1024, 4096), (1024, 4096)], 128)
    gate = online_cost([(14336, 4096)] * 2, 128)
    output, down = online_cost([(4096, 4096)]), online_cost([(4096, 14336)], 128)
    assert str(qkv) == "rotation 128x128 (2.08% of the linears' FLOPs)"
    assert str(gate) == "rotation 128x128 (0.45% of the linears' FLOPs)"
    assert str(output) == "nothing"
    assert str(down) == "rotation 128x128 (3.12% of the linears' FLOPs)"
    layer = total_cost([qkv, output, gate, down])
    assert layer == OnlineCost("3 of 4 sites", 2 * 128 * (4096 + 4096 + 14336), 2 * 4096 * (6144 + 4096 + 3 * 14336))
    assert str(layer) == "3 of 4 sites (1.32% of the linears' FLOPs)"


def test_words():
    assert str(online_cost([(100, 50)], 0, True)) == "scale (0.50% of the linears' FLOPs)"
    assert online_cost([(100, 50)], 10, True).what == "scale and rotation 10x10"
    assert total_cost([online_cost([(4, 4)])] * 2).what == "nothing"


def test_refused():
    with pytest.raises(ConfigError, match="48 channels are not whole blocks of 32"):
        online_cost([(4, 48)], 32)
    with pytest.raises(ConfigError, match="read one input"):
        online_cost([(4, 48), (4, 32)])
    with pytest.raises(ConfigError, match="read one input"):
        online_cost([])
