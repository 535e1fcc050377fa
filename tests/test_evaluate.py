"""Perplexity, against the definition in float64."""

import math

import pytest
from tiny_models import logits, tiny, tokens
from torch.nn import functional as F

from tqcompile.evaluate import perplexity


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_the_exponential_of_the_mean_next_token_loss(batch_size):
    model, windows = tiny("Llama"), tokens(7, 11)
    loss = 0.0
    for row in windows:
        loss += F.cross_entropy(logits(model, row[None])[0, :-1].double(), row[1:], reduction="sum").item()
    # float32 sums of at most 80 losses.
    assert perplexity(model, windows, batch_size) == pytest.approx(math.exp(loss / (7 * 10)), rel=1e-5)


def test_equal_logits_give_the_size_of_the_vocabulary():
    model = tiny("Llama")
    model.lm_head.weight.data.zero_()
    assert perplexity(model, tokens(2, 6)) == pytest.approx(97, rel=1e-6)
