"""The peers' benchmark with the question in the prompt, with presses of our own: kvpress has its own environment."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from agreement import equal_in_float32
from evaluation_inputs import character_tokenizer, long_llama, short_text

from benchmarks.peers import measuring
from benchmarks.peers.compressing import compress, read_context, read_question, side_by_side
from kvcluster.evaluation.quality import Options, needle_cases, run_all, summarize
from kvcluster.evaluation.runs import Runs, condense
from kvcluster.evaluation.texts import encode

MEASURED = ("n_tokens", "n_prompt", "n_stored", "nbytes")


class Latest:
    """A press that keeps the last tokens, and spoils what it was given, as it may."""

    def __init__(self, ratio):
        self.ratio, self.seen = ratio, []

    def post_init_from_model(self, model):
        self.model = model

    def compress(self, module, hidden, keys, values, weights, kwargs):
        assert module.rotary_emb is self.model.model.rotary_emb
        tensors = [hidden, keys, values, *([] if weights is None else [weights])]
        self.seen.append((module, [x.clone() for x in tensors], kwargs["position_embeddings"]))
        kept = [x[:, :, x.shape[2] - int(x.shape[2] * (1 - self.ratio)) :].clone() for x in (keys, values)]
        keys.zero_()
        values.zero_()
        return kept


@pytest.fixture(scope="module")
def model():
    return long_llama()


@pytest.fixture(scope="module")
def case():
    tokenizer = character_tokenizer()
    text = encode(tokenizer, short_text())
    [made] = needle_cases(tokenizer, text, "reporting", lengths=[700], n_contexts=1, n_needles=8, n_following=20)
    return made


@pytest.fixture(scope="module")
def prompts(model, case):
    context = read_context(model, case.tokens)
    return [read_question(model, context, needle.question) for needle in case.needles]


def nll_of(run):
    return np.array([[nll for needle in run["needles"] for nll in needle["nll"]]], dtype=np.float32)


def key_of(keep):
    return {"method": "latest", "keep": keep, "case": "", "model": "", "is_question_first": True}


@pytest.mark.parametrize("needs_weights", [False, True])
def test_a_press_is_given_what_one_reading_of_the_whole_prompt_gives_it(model, case, prompts, needs_weights):
    tokens, question = case.tokens, case.needles[0].question

    def given(read):
        press = Latest(0.5)
        [cache] = compress(model, [press], read, needs_weights=needs_weights)
        assert {layer.keys.shape[2] for layer in cache.layers} == {(700 + len(question)) // 2}
        assert cache.get_seq_length() == 700 + len(question)
        return press.seen

    expected = given(read_context(model, tokens + question))
    other = given(read_question(model, read_context(model, tokens), [*question[:-1], 3]))
    for seen, is_same in ((given(prompts[0]), True), (given(prompts[0]), True), (other, False)):
        assert len(seen) == len(expected) == 3
        for (module, tensors, rotary), (right, right_tensors, right_rotary) in zip(seen, expected, strict=True):
            assert module is right
            assert all(map(torch.equal, rotary, right_rotary))
            pairs = list(zip(tensors, right_tensors, strict=True))
            assert all(a.shape == b.shape for a, b in pairs)
            assert all(equal_in_float32(a.numpy(), b.numpy()) for a, b in pairs) == is_same


def test_the_full_cache_answers_as_that_of_our_own_methods(model, case, prompts, monkeypatch):
    monkeypatch.setattr(measuring, "rounded", list)
    first = Options(is_question_first=True)
    [ours] = run_all(model, character_tokenizer(), [case], [("full", 1.0)], Runs(), options=first)
    caches = [prompt.full() for prompt in prompts]
    theirs = measuring.measure_question_first(model, caches, prompts, case, key_of(1.0), seconds=0.0)
    assert [theirs[name] for name in MEASURED] == [ours[name] for name in MEASURED]
    assert [list(needle) for needle in theirs["needles"]] == [list(needle) for needle in ours["needles"]]
    assert equal_in_float32(nll_of(theirs), nll_of(ours))
    assert (
        set(condense(theirs))
        == set(condense(ours))
        == {"key", "task", "stored", "needles", "seconds", *MEASURED} - {"n_stored"}
    )
    [summary] = summarize([theirs])
    assert (summary["is_question_first"], summary["entries"]) == (True, 1)


def test_needles_side_by_side_are_those_alone_and_not_those_of_the_context_alone(model, case, prompts, monkeypatch):
    monkeypatch.setattr(measuring, "rounded", list)

    def measured(places):
        asked = replace(case, needles=[case.needles[place] for place in places])
        read = [prompts[place] for place in places]
        caches = [compress(model, [Latest(0.5)], prompt)[0] for prompt in read]
        return measuring.measure_question_first(model, caches, read, asked, key_of(0.5), seconds=0.0)

    places = list(range(len(prompts)))
    assert 1 < len({prompt.n_tokens for prompt in prompts}) < len(prompts)  # rows together, and not in order
    together, alone = nll_of(measured(places)), np.hstack([nll_of(measured([place])) for place in places])
    assert equal_in_float32(together, alone)
    assert not equal_in_float32(together, np.hstack([alone[:, 7:], alone[:, :7]]))
    [cache] = compress(model, [Latest(0.5)], prompts[0].context)
    later = measuring.measure(model, cache, case, key_of(0.5), seconds=0.0)
    assert not equal_in_float32(together, nll_of(later))
    full = [prompt.full() for prompt in prompts]
    exact = nll_of(measuring.measure_question_first(model, full, prompts, case, key_of(1.0), seconds=0.0))
    first = np.cumsum([0, *(len(needle.answer) for needle in case.needles)])[:-1]
    assert np.array_equal(together[:, first], exact[:, first])  # from the exact prefill
    assert not equal_in_float32(together, exact)


def test_what_cannot_stand_side_by_side_or_exceeds_its_share_is_refused(model, case, prompts):
    lengths = sorted({prompt.n_tokens for prompt in prompts})
    with pytest.raises(ValueError, match=f"caches must be of prompts of one length, got {lengths[0]}, .* tokens"):
        side_by_side([prompt.full() for prompt in prompts])
    caches = [compress(model, [Latest(0.4)], prompt)[0] for prompt in prompts]
    with pytest.raises(RuntimeError, match=f"latest must store 0.5 of {prompts[0].n_tokens} entries, got"):
        measuring.measure_question_first(model, caches, prompts, case, key_of(0.5), seconds=0.0)
