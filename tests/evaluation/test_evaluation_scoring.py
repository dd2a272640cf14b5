"""Scores are what the model itself says of context, question and answer, and the cache never sees a question."""

import copy

import numpy as np
import pytest
import torch
from agreement import equal_in_float32, logits_agree
from evaluation_inputs import character_tokenizer, long_llama, short_text
from models import greedy

from kvcluster.evaluation.quality import Needle, needle_cases
from kvcluster.evaluation.quality import scoring as scoring_module
from kvcluster.evaluation.quality.attention_error import attention_errors
from kvcluster.evaluation.quality.methods import METHODS, chunked_keep_ratio
from kvcluster.evaluation.quality.scoring import copy_rows, fill, following_nll, generate, prefill, score_needles
from kvcluster.evaluation.texts import encode
from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache, RecallCache

SIZE = {"lengths": [700], "n_contexts": 1, "n_needles": 4, "n_following": 60}


@pytest.fixture(scope="module")
def case():
    tokenizer = character_tokenizer()
    return needle_cases(tokenizer, encode(tokenizer, short_text()), "reporting", **SIZE)[0]


@pytest.fixture(scope="module")
def model():
    return long_llama()


def clustered(model, **parameters):
    return ClusteredCache.for_model(
        model, **{"keep_ratio": 0.25, "chunk_size": 32, "n_recent": 16, "method": SoftMatching(), **parameters}
    )


def full(model):
    return None


def nll_of(scores):
    return np.array([nll for score in scores for nll in score.nll], dtype=np.float32)


def nbytes(cache):
    return getattr(cache, "nbytes", 0)


def expected_nll(model, tokens, n_last):
    """Of the last tokens, by one plain call of the model: in float32 and in float64."""
    nll = []
    for each in (model, copy.deepcopy(model).double()):
        with torch.inference_mode():
            predicted = each(torch.tensor([tokens])).logits[0].log_softmax(dim=-1).numpy()
        nll.append(np.array([[-predicted[place - 1, tokens[place]] for place in range(len(tokens))[-n_last:]]]))
    return nll


@pytest.mark.parametrize("is_stepwise", [False, True])
def test_scores_of_the_full_cache_are_those_of_one_plain_call(model, case, is_stepwise):
    cache = prefill(model, full, case.tokens)
    scores = score_needles(model, cache, case.needles, nbytes=0, is_stepwise=is_stepwise)
    for needle, score in zip(case.needles, scores, strict=True):
        baseline, oracle = expected_nll(model, case.tokens + needle.question + needle.answer, len(needle.answer))
        assert logits_agree(np.array([score.nll]), baseline, oracle)
    found = following_nll(model, cache, case.following, is_stepwise=is_stepwise)
    assert logits_agree(np.array([found]), *expected_nll(model, case.tokens + case.following, 60))
    shifted = [Needle(each.question[:-1], each.question[-1:] + each.answer[:-1], "", 0) for each in case.needles]
    wrong = score_needles(model, cache, shifted, nbytes=0)
    for needle, score in zip(case.needles, wrong, strict=True):
        baseline, oracle = expected_nll(model, case.tokens + needle.question + needle.answer, len(needle.answer))
        assert not logits_agree(np.array([score.nll]), baseline, oracle)


@pytest.mark.parametrize("make", [full, clustered, lambda model: RecallCache.for_model(model, budget=200)])
def test_questions_know_nothing_of_each_other(model, case, make, monkeypatch):
    """Side by side, one by one or in another order; and the cache is as it was."""
    cache = prefill(model, make, case.tokens)
    before = [layer.keys.clone() for layer in cache.layers]
    scores = score_needles(model, cache, case.needles, nbytes=nbytes(cache), is_stepwise=True)
    backwards = score_needles(model, cache, case.needles[::-1], nbytes=nbytes(cache), is_stepwise=True)
    monkeypatch.setattr(scoring_module, "COPIED_BYTES", 1)
    alone = score_needles(model, cache, case.needles, nbytes=1, is_stepwise=True)
    for other in (backwards[::-1], alone):
        assert [each.is_right for each in other] == [each.is_right for each in scores]
        assert equal_in_float32(nll_of(other), nll_of(scores))
    following_nll(model, cache, case.following)
    generate(model, cache, case.needles[0].question, n_new=3, stop=frozenset())
    assert cache.get_seq_length() == 700
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_a_cache_that_saw_the_question_would_score_otherwise(model, case):
    needle = case.needles[0]
    blind = prefill(model, clustered, case.tokens)
    told = prefill(model, clustered, case.tokens + needle.question[:-1])
    [right] = score_needles(model, blind, [needle], nbytes=nbytes(blind))
    [wrong] = score_needles(model, told, [Needle(needle.question[-1:], needle.answer, "", 0)], nbytes=nbytes(told))
    assert not equal_in_float32(nll_of([right]), nll_of([wrong]))


@pytest.mark.parametrize("name", ["clustered", "recalled"])
def test_a_filled_cache_is_one_that_read_the_context(model, case, name):
    def make(model):
        return clustered(model) if name == "clustered" else RecallCache.for_model(model, budget=200)

    read = prefill(model, full, case.tokens)
    before = [layer.keys.clone() for layer in read.layers]
    ours, theirs = fill(make(model), read), prefill(model, make, case.tokens)
    assert (ours.n_seen, ours.n_stored, ours.nbytes) == (theirs.n_seen, theirs.n_stored, theirs.nbytes)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.held(), b.held(), strict=True))
    asked = [following_nll(model, cache, case.following, is_stepwise=True) for cache in (ours, theirs)]
    assert asked[0] == asked[1]
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(read.layers, before, strict=True))


def test_generation_is_that_of_transformers(model, case):
    question = case.needles[0].question
    for make in (full, clustered):
        cache = prefill(model, make, case.tokens)
        tokens = generate(model, cache, question, n_new=12, stop=frozenset())
        whole = torch.tensor([case.tokens + question])
        assert tokens == greedy(model, whole, 12, past_key_values=copy_rows(cache))[0].tolist()
        assert (
            generate(model, cache, question, n_new=12, stop=frozenset({tokens[3]})) == tokens[: tokens.index(tokens[3])]
        )
    with pytest.raises(ValueError, match="question must have at least one token"):
        generate(model, cache, [], n_new=1, stop=frozenset())


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_each_layers_attention_error_is_its_own(model, case):
    """The layer after a compressed one is given the queries of the full cache, and its keys are all there."""
    read = prefill(model, full, case.tokens)
    one = fill(clustered(model, keep_ratio=[1.0, 0.25, 1.0]), read)
    hooks = n_hooks(model)
    for is_stepwise in (False, True):
        errors = attention_errors(model, read, one, case.following, is_stepwise=is_stepwise)
        assert len(errors) == 3
        assert 1000 * max(errors[0], errors[2]) < errors[1] < 1
    all_of_it = fill(clustered(model), read)
    assert 1000 * errors[2] < min(attention_errors(model, read, all_of_it, case.following))
    assert attention_errors(model, read, read, case.following) == [0, 0, 0]
    assert n_hooks(model) == hooks


@pytest.mark.parametrize("n_tokens", [300, 700, 1111])
@pytest.mark.parametrize("keep", [0.8, 0.5, 1.0])
def test_chunked_stores_what_it_may_and_hardly_less(model, n_tokens, keep):
    ratio = chunked_keep_ratio(keep, n_tokens)
    stored = []
    for each in (ratio, min(1.0, ratio + 1 / 64)):
        cache = ClusteredCache.for_model(model, keep_ratio=each, chunk_size=64, n_recent=64, method=SoftMatching())
        stored.append(prefill(model, lambda _, cache=cache: cache, [7] * n_tokens).n_stored)
    assert stored[0] <= keep * n_tokens
    assert stored[1] > keep * n_tokens or ratio == 1
    assert (
        prefill(model, lambda model: METHODS["chunked"].make(model, keep, n_tokens), [7] * n_tokens).n_stored
        == stored[0]
    )


@pytest.mark.parametrize("n_tokens", [600, 1111])
@pytest.mark.parametrize("keep", [0.8, 0.7])
def test_distinctive_stores_what_it_may_and_hardly_less(model, n_tokens, keep):
    n_stored = prefill(model, lambda model: METHODS["distinctive"].make(model, keep, n_tokens), [7] * n_tokens).n_stored
    assert keep * n_tokens - (n_tokens - 256) // 256 <= n_stored <= keep * n_tokens


def test_a_profile_is_that_of_the_model(model):
    with pytest.raises(ValueError, match="model must be one whose profile is known"):
        METHODS["distinctive-heads"].make(model, 0.5, 4096)
    with pytest.raises(
        ValueError, match=r"keep must leave an entry for each of 15 chunks beside 256 exact tokens, got 0.06"
    ):
        METHODS["distinctive"].make(model, 0.06, 4096)
