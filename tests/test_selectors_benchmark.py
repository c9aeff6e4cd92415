"""The study of selectors measures what it says, on keys made up for it."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import selectors

TOKENS, QUERIES = 700, 3
POLICIES = ["oracle", "quest", "sketch2", "random"]
ARGS = argparse.Namespace(policies=POLICIES, budgets=[128, 704])


@pytest.fixture(scope="module")
def found():
    """Keys in clusters of a page, a needle that every query looks for, and all that is measured of them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    key = normal(2, 44, 1, 64).expand(-1, -1, 16, -1).flatten(1, 2)[:, :TOKENS] + 0.5 * normal(2, TOKENS, 64)
    query = normal(QUERIES, 6, 64)
    key[:, 200] = query.mean(0).view(2, 3, 64).mean(1) * 24
    layer = selectors.Layer(key, normal(2, TOKENS, 64), query)
    text = selectors.Text("needle", [0] * TOKENS, QUERIES, range(196, 210))
    sums = {(policy, budget): selectors.Sums() for policy in POLICIES for budget in ARGS.budgets}
    selectors.measure_layer(layer, text, ARGS, sums)
    return sums


def test_policies_lie_between_chance_and_oracle(found):
    """No policy beats the oracle, and informed ones beat chance."""
    share = {policy: found[policy, 128].mass / found[policy, 128].oracle_mass for policy in POLICIES}
    assert share["oracle"] == 1
    assert share["random"] < 0.5 and 0.9 < share["quest"] <= 1 and 0.99 < share["sketch2"] <= 1
    assert found["oracle", 128].l2 < found["random", 128].l2


def test_budget_of_all_pages_is_exact(found):
    for policy in POLICIES:
        sums = found[policy, 704]
        assert sums.mass == sums.oracle_mass
        assert sums.l2 / sums.rows < 1e-5
        assert sums.needle_pages_chosen == sums.needle_pages


def test_needles_are_found(found):
    assert found["sketch2", 128].needle_pages > 0
    assert found["sketch2", 128].needle_pages_chosen == found["sketch2", 128].needle_pages
