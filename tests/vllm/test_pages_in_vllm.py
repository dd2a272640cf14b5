"""What vLLM's pages hold is what the reference computes from the same keys and values, bit for bit."""

import numpy as np
import pytest
from agreement import assert_same_bits
from caches import of_reference
from engines import CLUSTERED, PAGE, Watched, random_prompts
from inputs import to_numpy

from kvcluster.fast import Distinctive
from kvcluster.fast.vllm.settings import Settings

SIZES = [300, 301, 33, 180, 181, 600, 420, 64, 250, 519, 128, 309, 436, 437, 200, 565, 31, 310, 700, 1]  # 20 prompts


class Checked:
    """After each step, the pages of requests whose clusters are new are compared with the reference."""

    def __init__(self, watched, settings, layers=(0, 2), **other):
        self.watched, self.rule, self.layers = watched, settings.rule(PAGE), layers
        self.parameters = {
            "keep_ratio": settings.keep_ratio,
            "chunk_size": self.rule.chunk_size,
            "n_sink": PAGE,
            "n_recent": settings.n_recent,
            "method": self.rule.method,
        } | other
        self.n_chunks, self.n_tokens, self.n_compared = {}, {}, 0

    def __call__(self):
        for request in self.watched.requests:
            n_tokens = self.watched.seen[request][0][0].shape[1]
            row = self.watched.runner.input_batch.req_id_to_index[request]
            n_prompt = int(self.watched.runner.input_batch.num_prompt_tokens[row])
            n_chunks = self.rule.n_chunks(n_tokens, n_prompt)
            is_new = n_chunks != self.n_chunks.get(request) or n_tokens != self.n_tokens.get(request, 0) + 1
            self.n_chunks[request], self.n_tokens[request] = n_chunks, n_tokens
            if n_tokens >= n_prompt and is_new:  # in the course of decoding, or prefilled, maybe again
                self.n_compared += n_chunks
                self.compare(request)

    def compare(self, request):
        for layer in self.layers:
            cache = of_reference(**self.parameters)
            cache.append(*map(to_numpy, self.watched.seen[request][layer]))
            for held, expected in zip(
                self.watched.held(request, self.rule, layer), (cache.keys, cache.values, cache.counts), strict=True
            ):
                assert_same_bits(held, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["distinctive", "soft_matching"])
def test_pages_of_twenty_prompts_have_the_bits_of_the_reference(engine, monkeypatch, method, dtype):
    parameters = CLUSTERED | {"method": method}
    served = engine(parameters, dtype=dtype)
    checked = Checked(Watched(served, monkeypatch), Settings(**parameters))
    served.generate(random_prompts(SIZES), 24, after_step=checked)
    assert checked.n_compared > 30


def test_generated_tokens_are_clustered_as_they_leave_the_recent_ones(engine, monkeypatch):
    served = engine(CLUSTERED)
    checked = Checked(Watched(served, monkeypatch), Settings(**CLUSTERED), layers=(0,))
    served.generate(random_prompts([100, 290]), 300, after_step=checked)
    assert max(checked.n_chunks.values()) == 4  # of 590 tokens; the prompts alone have 0 and 1
    blocks_of_tokens = -(-100 // PAGE) + -(-290 // PAGE)
    assert served.records[-1][1] < blocks_of_tokens + 600 // PAGE - 9


def test_pages_after_a_preemption_have_the_bits_of_the_reference(engine, monkeypatch):
    """Of the keys and values that were computed again, in pieces, some of which attend to clusters."""
    served = engine(CLUSTERED, n_blocks=26, max_model_len=736, max_num_batched_tokens=64)
    checked = Checked(Watched(served, monkeypatch), Settings(**CLUSTERED), layers=(0,))
    served.generate(random_prompts([300, 180, 420, 250, 309, 190], seed=2), [100, 200, 30, 90, 120, 250], checked)
    assert served.preempted


@pytest.mark.parametrize("keep_ratio", [0.5, 0.2])
def test_other_ratios_and_chunked_prefill(engine, monkeypatch, keep_ratio):
    parameters = {"keep_ratio": keep_ratio, "chunk_size": 160 if keep_ratio == 0.2 else 64, "n_recent": 0}
    served = engine(parameters, max_num_batched_tokens=128)
    checked = Checked(Watched(served, monkeypatch), Settings(**parameters), layers=(1,))
    served.generate(random_prompts([300, 450, 77, 520]), 8, after_step=checked)
    assert checked.n_compared > 5


@pytest.mark.parametrize(
    "wrong", [{"n_recent": 60}, {"method": Distinctive(n_shared=5)}, {"n_sink": 0}, {"keep_ratio": 0.24}]
)
def test_pages_differ_from_a_cache_with_another_parameter(engine, monkeypatch, wrong):
    served = engine(CLUSTERED)
    checked = Checked(Watched(served, monkeypatch), Settings(**CLUSTERED), layers=(0,), **wrong)
    with pytest.raises(AssertionError):
        served.generate(random_prompts([310]), 2, after_step=checked)
    assert served.llm.llm_engine.has_unfinished_requests()  # so it was the pages of the first step
    served.llm.llm_engine.abort_request([str(served.n_asked)])


def test_pages_hold_counts_in_the_memory_that_vllm_was_told_of(engine):
    served = engine(CLUSTERED)
    spec = served.manager.kv_cache_spec
    assert spec.page_size_bytes == PAGE * 2 * (2 * 32 * 4 + 4)  # 2 heads of dim 32, float32, and a count
    assert all(pages.nbytes == 200 * spec.page_size_bytes for pages in served.runner.kv_caches)
    assert np.prod(served.runner.kv_caches[0].shape[1:]) * 4 == spec.page_size_bytes
