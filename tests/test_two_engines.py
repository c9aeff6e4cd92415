"""Two engines with other policies in one process: what one knows of its pages never reaches the other."""

from __future__ import annotations

import pytest
from tiny_engine import attention_layers, kv_cache, prompts, tokens

pytestmark = [pytest.mark.engine, pytest.mark.seam]

ENGINES = {
    "ranges": {"decode_policy": "quest"},
    "sketches": {"decode_policy": "sketch2", "prefill_policy": "vertical_slash", "min_prefill_tokens": 64},
}
PROMPTS, NUM_TOKENS = prompts((300, 700, 40)), 16


def start_request(llm, number: int, prompt: list[int]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)


def step(llm, answers: dict[int, list[int]]) -> bool:
    """One step of ``llm``; whether it has more to do."""
    for output in llm.llm_engine.step():
        answers[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
    return llm.llm_engine.has_unfinished_requests()


def test_engines_of_other_policies_answer_step_by_step_as_each_does_alone(tiny):
    alone, slots = [], []
    for sparse in ENGINES.values():
        with tiny.start(sparse=sparse) as llm:
            alone.append(tokens(llm, PROMPTS, NUM_TOKENS))
            slots.append({kv_cache(layer).shape[2] for layer in attention_layers(llm).values()})
    assert slots[0] != slots[1], "pages of the two look alike: nothing is tested"
    with tiny.start(sparse=ENGINES["ranges"]) as first:
        tiny._running = False  # on purpose: these two are told apart by their outputs, not by counters
        with tiny.start(sparse=ENGINES["sketches"]) as second:
            engines, answers = [first, second], [{}, {}]
            for llm, expected in zip(engines, slots, strict=True):
                assert {kv_cache(layer).shape[2] for layer in attention_layers(llm).values()} == expected
            for number, prompt in enumerate(PROMPTS):
                for llm in engines:
                    start_request(llm, number, prompt)
            while any([step(llm, answer) for llm, answer in zip(engines, answers, strict=True)]):
                pass
    assert [[answer[number] for number in range(len(PROMPTS))] for answer in answers] == alone
