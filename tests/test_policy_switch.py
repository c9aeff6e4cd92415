"""An engine switched to another prefill policy against one that started with it: what quality is measured by."""

from __future__ import annotations

import pytest
from tiny_engine import prompts, tokens

from benchmarks.policy_switch import PolicySwitch

pytestmark = pytest.mark.engine

LITTLE = {
    "decode_policy": "dense", "min_prefill_tokens": 64, "prefill_coverage": 0, "vertical_tokens": 32,
    "slash_tokens": 32, "dense_layers": 0, "budget_tokens": 128, "min_context_tokens": 0,
}  # fmt: skip
FIRST, OTHER = ({**LITTLE, "prefill_policy": name} for name in ("vertical_slash", "a_shape"))
DENSE = {**LITTLE, "prefill_policy": "dense"}
LONG = prompts((700, 517), seed=9)
SETTINGS = {"enable_prefix_caching": False}


@pytest.mark.seam
def test_a_switched_engine_answers_as_one_that_started_so(tiny):
    switch = PolicySwitch()
    with switch.watching(), tiny.start(sparse=FIRST, **SETTINGS) as llm:
        first = tokens(llm, LONG)
        switch.to(OTHER)
        other = tokens(llm, LONG)
        switch.to(DENSE)
        dense = tokens(llm, LONG)
        switch.to(FIRST)
        assert tokens(llm, LONG) == first
        with pytest.raises(ValueError, match=r"sparse\.dense_layers: 1; this engine started with 0"):
            switch.to({**FIRST, "dense_layers": 1})
    with tiny.start(sparse=OTHER, **SETTINGS) as llm:
        assert tokens(llm, LONG) == other
    assert other != first != dense
    assert dense == tiny.stock(LONG)


def test_an_engine_that_was_not_watched_is_refused():
    with pytest.raises(ValueError, match="no layer of this engine is sparse"):
        PolicySwitch().to(FIRST)
