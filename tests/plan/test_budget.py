"""How many tokens some memory holds: a forward of so many fills the share of it that is to be used."""

import pytest

from mlc_ray.plan.budget import USED_SHARE, tokens_in
from mlc_ray.plan.lengths import assumed, cut
from mlc_ray.plan.memory import activations
from tests.plan.test_memory import shape
from tests.train.tiny import tiny_config

GIB = 2**30


@pytest.mark.parametrize("name", ["qwen2.5-7b", "gemma-2-9b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("again", [False, "selective", True])
def test_a_forward_of_a_budget_fills_the_share_that_is_used(name, again):
    config = tiny_config(model={"gradient_checkpointing": again}, train={"batch_bundles": 512})
    weights = assumed(config)
    budget = tokens_in(40 * GIB, config, shape(name), weights, size=2, workers=1)
    rows = cut(config, weights, tokens_per_forward=budget, workers=1).largest  # of steps with terms and without
    assert len(rows) == 2
    each = max(sum(part.bytes for part in activations(config, shape(name), row, 2)) / row.tokens for row in rows)
    assert budget * each == pytest.approx(USED_SHARE * 40 * GIB, rel=0.05)  # bundles do not fill it exactly


def test_what_takes_more_leaves_fewer_tokens():
    def budget(name="qwen2.5-7b", free=40 * GIB, size=2, **sections):
        config = tiny_config(train={"batch_bundles": 32}, **sections)
        return tokens_in(free, config, shape(name), assumed(config), size=size, workers=8)

    assert budget(free=-5) == budget(free=0) == 1
    assert budget(free=80 * GIB) == pytest.approx(2 * budget(), abs=2)
    assert budget(size=4) < budget() < budget(model={"gradient_checkpointing": "selective"})
    # Terms on next tokens hold more rows of logits; scores that are capped, and experts, hold more of a block.
    plain = {"objective": {"loss": "sft"}, "model": {"gradient_checkpointing": True}}
    assert budget(**plain, terms={"kl": {}}, reference="online") < 0.9 * budget(**plain)
    assert budget("gemma-2-9b") < 0.7 * budget("llama-3.1-8b")
