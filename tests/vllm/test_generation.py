"""What vLLM generates with clustered pages: the tokens of transformers with the same cache, whoever else is served."""

import numpy as np
import pytest
import torch
from engines import CLUSTERED, PAGE, random_prompts
from models import greedy, tiny_llama

from kvcluster.fast import Distinctive
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.vllm import attention
from kvcluster.fast.vllm.rule import PageRule

PROMPTS = random_prompts([300, 40, 600, 161, 437], seed=1)
TRANSFORMERS = {
    "keep_ratio": 0.25,
    "chunk_size": 128,
    "n_sink": PAGE,
    "n_recent": 20,
    "method": Distinctive(n_shared=4),
}


@pytest.fixture(scope="module")
def expected():
    """The tokens that transformers generates with our cache, one prompt after the other."""
    model = tiny_llama(head_dim=32)

    def answer(prompt):
        cache = ClusteredCache.for_model(model, **TRANSFORMERS)
        return greedy(model, torch.tensor([prompt]), 48, past_key_values=cache)[0].tolist()

    return [answer(prompt) for prompt in PROMPTS]


def test_tokens_are_those_of_transformers_with_the_same_cache(engine, expected):
    assert engine(CLUSTERED).generate(PROMPTS, 48) == expected


def test_a_full_cache_generates_other_tokens(engine, expected):
    assert engine().generate(PROMPTS, 48) != expected


def test_dropped_log_counts_would_be_seen(engine, expected, monkeypatch):
    def without_counts(query, cells, tables, requests, **options):
        return whole(query, cells, tables, requests * torch.tensor([1, 1, 1, 0, 0]), **options)

    whole = attention.attend_pages
    monkeypatch.setattr(attention, "attend_pages", without_counts)
    assert engine(CLUSTERED).generate(PROMPTS, 48) != expected


def test_wrong_positions_would_be_seen(engine, expected, monkeypatch):
    served = engine(CLUSTERED)
    forward = served.runner.model.forward

    def at_entries(input_ids, positions, *args, **kwargs):
        if len(positions) == 1 and int(positions) >= 300:  # as if a token stood where its entry does
            positions = positions - 96
        return forward(input_ids, positions, *args, **kwargs)

    monkeypatch.setattr(served.runner.model, "forward", at_entries)
    assert served.generate(PROMPTS[:1], 48) != expected[:1]


def test_a_pool_so_small_that_requests_wait_changes_nothing(engine, expected):
    served = engine(CLUSTERED, n_blocks=20, max_model_len=700)
    assert served.generate(PROMPTS, 48) == expected
    assert not served.preempted
    assert served.most_at_once < len(PROMPTS)


def test_a_prompt_that_fits_a_step_never_holds_its_holes(engine, expected):
    """So that requests of 648 tokens, 21 blocks, are served by a pool of 13."""
    served = engine(CLUSTERED, n_blocks=14, max_model_len=700)
    assert served.generate(PROMPTS[2:3], 48) == expected[2:3]
    assert served.records[0] == (1, 7)
    assert max(held for _, held in served.records) == 9
    split = engine(CLUSTERED, max_num_batched_tokens=512)  # of which 256 are for requests that generate
    assert split.generate(PROMPTS[2:3], 48) == expected[2:3]
    assert max(held for _, held in split.records) == 19


def test_a_prompt_that_fits_a_step_is_not_split(engine, expected):
    """Though there were tokens left in the first step: it would have to hold its holes."""
    served = engine(CLUSTERED)
    assert served.generate([PROMPTS[2], PROMPTS[4]], 48) == [expected[2], expected[4]]
    assert [running for running, _ in served.records[:2]] == [1, 2]


def test_a_block_freed_too_early_would_be_seen(engine, expected, monkeypatch):
    """The hole with a page of entries in it: other requests write there."""
    hole = PageRule.hole
    monkeypatch.setattr(
        PageRule, "hole", lambda rule, chunk: range(hole(rule, chunk).start - 1, hole(rule, chunk).stop)
    )
    assert engine(CLUSTERED, n_blocks=20, max_model_len=700).generate(PROMPTS, 48) != expected


def test_blocks_of_holes_are_used_by_others(engine):
    """Of each prompt of 600 tokens, 19 blocks, 7 are left: as many requests fit that stock would have to let wait."""
    prompts = random_prompts([600] * 6, seed=3)
    stock, clustered = engine(n_blocks=56), engine(CLUSTERED, n_blocks=56)
    stock.generate(prompts, 20)
    clustered.generate(prompts, 20)
    assert stock.most_at_once == 2
    assert clustered.most_at_once == 6
    assert not clustered.preempted


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 64},
        {"long_prefill_token_threshold": 200},
        {"enable_prefix_caching": True},
        {"max_num_seqs": 2},
        {"enforce_eager": False},
    ],
    ids=["chunked prefill", "long prompts in pieces", "prefix caching requested", "two at a time", "compiled"],
)
def test_options_of_the_engine_change_nothing(engine, expected, options):
    served = engine(CLUSTERED, **options)
    assert served.generate(PROMPTS, 48) == expected
    assert served.generate(PROMPTS, 48) == expected  # nothing of the first time may be found again


def test_ratio_1_is_stock(engine):
    sizes = np.random.default_rng(4).integers(1, 700, 12).tolist()
    prompts = random_prompts(sizes, seed=4)
    assert engine({"keep_ratio": 1.0}).generate(prompts, 40) == engine().generate(prompts, 40)


def test_two_hundred_requests_in_a_pool_that_forces_preemption(engine):
    """All end with as many tokens as they asked for, no block leaks, and whoever was not preempted is not disturbed."""
    rng = np.random.default_rng(5)
    prompts = random_prompts(rng.integers(1, 600, 200).tolist(), seed=5)
    lengths = rng.integers(1, 120, 200).tolist()
    small, large = engine(CLUSTERED, n_blocks=26, max_model_len=736), engine(CLUSTERED, n_blocks=2000)
    first = small.n_asked + 1
    made = small.generate(prompts, lengths)
    assert len(small.preempted) > 5
    assert [len(tokens) for tokens in made] == lengths
    undisturbed = [at for at in range(200) if str(first + at) not in small.preempted]
    wide = large.generate(prompts, lengths)
    assert [made[at] for at in undisturbed] == [wide[at] for at in undisturbed]
    assert small.pool.get_num_free_blocks() == small.n_free
