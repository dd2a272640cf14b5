"""Question first: the prompt is read exactly, compressed as a whole, and answered from what is left of it."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from agreement import equal_in_float32, logits_agree
from evaluation_inputs import character_tokenizer, long_llama, short_text
from models import greedy, tiny_gemma
from rich.console import Console

from kvcluster.evaluation.quality import METHODS, Method, Options, needle_cases, reading, run_all, summarize, task_case
from kvcluster.evaluation.quality.attention_error import attention_errors
from kvcluster.evaluation.quality.methods import chunked
from kvcluster.evaluation.quality.reading import Context
from kvcluster.evaluation.quality.scoring import (
    fill,
    following_nll,
    generate,
    generate_on,
    prefill,
    score_answers,
    score_needles,
)
from kvcluster.evaluation.quality.tables import print_summaries
from kvcluster.evaluation.runs import Runs, condense
from kvcluster.evaluation.texts import encode

FIRST = Options(is_question_first=True)
PAIRS = [("full", 1.0), ("chunked", 0.5), ("recall", 0.5)]


def lively_llama():
    """A Llama that does not say the same token again and again, whatever is left of its context."""
    model = long_llama()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


MODELS = {"llama": lively_llama, "gemma3_text": tiny_gemma}


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def cases(tokenizer):
    text = encode(tokenizer, short_text())
    made = needle_cases(tokenizer, text, "reporting", lengths=[400], n_contexts=2, n_needles=2, n_following=20)
    return [*made, task_case("single", tokenizer, short_text(), text, "reporting", 0, 400)]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def results(model, tokenizer, cases):
    return run_all(model, tokenizer, cases, PAIRS, Runs(), options=FIRST)


def without_seconds(results):
    return [{name: value for name, value in each.items() if name != "seconds"} for each in results]


def nll_of(run):
    return [needle["nll"] for needle in run["needles"]]


def first_tokens(run):
    return [nll[0] for nll in nll_of(run)]


def numbers(run):
    """Of all tokens of all needles."""
    return np.array([[nll for needle in nll_of(run) for nll in needle]], dtype=np.float32)


def sliding(cache):
    return [layer for layer in cache.layers if layer.is_sliding]


def one_call(model, tokens):
    """Logits (tokens, vocabulary) of a plain call."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


def test_a_question_behind_a_context_is_read_as_the_prompt_is(model, cases):
    tokens, question = cases[0].tokens, cases[0].needles[0].question
    context = Context(model, tokens)
    asked = context.ask(question)
    assert asked.prompt.tokens == tokens + question
    assert (context.full.get_seq_length(), asked.prompt.full.get_seq_length()) == (400, 400 + len(question))
    plain = one_call(model, tokens + question)[-1:]
    exact = one_call(copy.deepcopy(model).double(), tokens + question)[-1:]
    assert logits_agree(asked.logits[None].numpy(), plain, exact)
    compressed = Context(model, tokens)
    compressed.full = context.cache(METHODS["chunked"], 0.5)
    assert not logits_agree(compressed.ask(question).logits[None].numpy(), plain, exact)
    with pytest.raises(ValueError, match="question must have at least one token, got none"):
        context.ask([])


def test_an_answer_begins_with_the_exact_prefill_and_goes_on_from_the_compressed_cache(results):
    for full, clustered, recalled in (results[:3], results[3:6]):
        for run in (clustered, recalled):
            assert first_tokens(run) == first_tokens(full)
            assert all(a[1:] != b[1:] for a, b in zip(nll_of(run), nll_of(full), strict=True))


def test_a_cache_compressed_before_the_question_gives_other_numbers(model, tokenizer, cases, results):
    later = run_all(model, tokenizer, cases, PAIRS, Runs())
    for before, after in zip(later[:6], results[:6], strict=True):
        assert equal_in_float32(numbers(before), numbers(after)) == (before["key"]["method"] == "full")
    assert first_tokens(later[1]) != first_tokens(later[0])


def test_a_question_is_read_once_for_all_methods_and_again_without_room(tokenizer, cases, monkeypatch):
    model, calls = lively_llama(), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(args[0].shape[1]), with_kwargs=True
    )
    expected = {}
    for n_bytes, times in ((2**32, 1), (0, 3)):
        monkeypatch.setattr(reading, "KEPT_BYTES", n_bytes)
        calls.clear()
        expected[times] = run_all(model, tokenizer, cases[:1], PAIRS, Runs(), options=FIRST)
        assert calls.count(400) == 1
        assert calls.count(len(cases[0].needles[0].question)) == times
    handle.remove()
    assert without_seconds(expected[1]) == without_seconds(expected[3])


@pytest.mark.parametrize("is_stepwise", [False, True])
def test_an_answer_from_a_cache_that_keeps_all_is_that_of_one_plain_call(model, cases, is_stepwise):
    tokens, needle = cases[0].tokens, cases[0].needles[0]
    whole, n_answer = tokens + needle.question + needle.answer, len(needle.answer)

    def nll(logits):
        return torch.nn.functional.cross_entropy(
            torch.tensor(logits[-n_answer - 1 : -1]), torch.tensor(needle.answer), reduction="none"
        ).numpy()[None]

    plain, exact = nll(one_call(model, whole)), nll(one_call(copy.deepcopy(model).double(), whole))
    for keep in (1.0, 0.5):
        asked = Context(model, tokens).ask(needle.question)
        cache = asked.prompt.cache(METHODS["chunked"], keep)
        [score] = score_answers(model, cache, asked.logits[None], [needle.answer], is_stepwise=is_stepwise)
        assert logits_agree(np.array([score.nll], dtype=np.float32), plain, exact) == (keep == 1)


@pytest.mark.parametrize("name", ["chunked", "recall"])
def test_generation_is_that_of_transformers_with_the_prompt_in_one_call(model, cases, name):
    """`generate` of transformers reads the prompt exactly, and our caches compress after their first call."""
    context, question, method = Context(model, cases[0].tokens), cases[0].needles[1].question, METHODS[name]
    prompt = context.tokens + question
    cache = method.make(model, 0.35, len(prompt))
    expected = greedy(model, torch.tensor([prompt]), 24, past_key_values=cache)[0].tolist()
    assert len(set(expected)) > 4

    def generated(stop=frozenset()):
        asked = context.ask(question)
        return generate_on(model, asked.prompt.cache(method, 0.35), asked.logits, n_new=24, stop=stop)

    assert generated() == expected
    assert generated(frozenset(expected[3:4])) == expected[: expected.index(expected[3])]
    before = generate(model, context.cache(method, 0.35), question, n_new=24, stop=frozenset())
    assert before != expected


@pytest.mark.parametrize("name", ["chunked", "distinctive", "recall"])
def test_a_filled_cache_is_one_that_read_the_prompt_where_layers_slide_too(model, cases, name):
    tokens, following = cases[0].tokens + cases[1].tokens, cases[0].following
    full = prefill(model, lambda model: None, tokens)
    before = [layer.keys.clone() for layer in full.layers]
    ours = fill(METHODS[name].make(model, 0.9, 800), full)
    theirs = prefill(model, lambda model: METHODS[name].make(model, 0.9, 800), tokens)
    assert [(layer.n_stored, layer.nbytes) for layer in ours.report().layers] == [
        (layer.n_stored, layer.nbytes) for layer in theirs.report().layers
    ]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        held = [(a.keys, a.values), (b.keys, b.values)] if a.is_sliding else [a.held(), b.held()]
        assert all(torch.equal(x, y) for x, y in zip(*held, strict=True))
    asked = [following_nll(model, cache, following, is_stepwise=True) for cache in (ours, theirs)]
    assert asked[0] == asked[1]
    with torch.inference_mode():
        model(torch.tensor([following]), past_key_values=ours)  # not on a copy: the full one must not notice
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(full.layers, before, strict=True))


def test_a_fill_that_forgets_the_windows_is_found_out(cases):
    model = tiny_gemma()
    cache = fill(METHODS["chunked"].make(model, 0.5, 400), prefill(model, lambda model: None, cases[0].tokens))
    assert len(sliding(cache)) == 2
    empty = METHODS["chunked"].make(model, 0.5, 400)
    cache.layers = [b if b.is_sliding else a for a, b in zip(cache.layers, empty.layers, strict=True)]
    with pytest.raises(RuntimeError, match="the layers of the cache must have seen the same tokens, got 0 to 400"):
        following_nll(model, cache, cases[0].following)


def test_needles_side_by_side_are_those_alone_where_layers_slide(cases):
    model, needles = tiny_gemma(), cases[0].needles
    cache = Context(model, cases[0].tokens).cache(METHODS["chunked"], 0.5)
    rows = score_needles(model, cache, needles, nbytes=cache.nbytes)
    alone = [score_needles(model, cache, [needle], nbytes=cache.nbytes)[0] for needle in needles]
    assert all(
        equal_in_float32(np.array(a.nll, dtype=np.float32), np.array(b.nll, dtype=np.float32))
        for a, b in zip(rows, alone, strict=True)
    )
    assert rows[0].nll != rows[1].nll


def test_errors_of_attention_are_those_of_layers_that_do_not_slide(cases):
    model, context = tiny_gemma(), Context(tiny_gemma(), cases[0].tokens)
    context.model = model
    cache = context.cache(METHODS["chunked"], 0.5)
    errors = attention_errors(model, context.full, cache, cases[0].following)
    assert errors[0] == errors[2] == 0 < min(errors[1], errors[3])


def test_a_method_that_is_not_blind_reads_the_whole_prompt(model, tokenizer, cases, monkeypatch):
    read = []

    def noting(model, keep, n_tokens):
        read.append(n_tokens)
        return chunked(model, keep, n_tokens)

    monkeypatch.setitem(METHODS, "reader", Method(noting, ""))
    monkeypatch.setitem(METHODS, "filled", replace(METHODS["reader"], is_blind=True))
    reader, filled = run_all(model, tokenizer, cases[:1], [("reader", 0.5), ("filled", 0.5)], Runs(), options=FIRST)
    n_prompts = [400 + len(needle.question) for needle in cases[0].needles]
    assert sorted(set(read)) == sorted(set(n_prompts))
    assert equal_in_float32(numbers(reader), numbers(filled))
    assert [run["n_prompt"] for run in (reader, filled)] == [max(n_prompts)] * 2


def test_what_a_run_says_of_itself_is_true(model, cases, results):
    """Layers that slide are in the bytes, not in the entries, of which no method could store fewer."""
    full, clustered, recalled = results[:3]
    n_prompt = 400 + max(len(needle.question) for needle in cases[0].needles)
    n_layers = sum(not layer.is_sliding for layer in Context(model, cases[0].tokens).full.layers)
    assert full["n_stored"] == recalled["n_stored"] == [n_prompt] * n_layers
    assert len(set(clustered["n_stored"])) == 1
    assert 0.5 * n_prompt - 7 < clustered["n_stored"][0] <= 0.5 * n_prompt
    window_bytes = sum(2 * x.keys.nbytes for x in sliding(Context(model, cases[0].tokens).full))
    assert full["nbytes"] == n_layers * 2 * 2 * n_prompt * 16 * 4 + window_bytes
    assert clustered["nbytes"] == n_layers * 2 * clustered["n_stored"][0] * (2 * 16 * 4 + 4) + window_bytes
    assert all("following_nll" not in run for run in results)
    assert [len(run["prompts"]) for run in results[6:]] == [1, 1, 1]


def test_a_method_that_exceeds_its_budget_of_the_prompt_is_found_out(tokenizer, cases, monkeypatch):
    monkeypatch.setitem(METHODS, "greedy", Method(lambda model, keep, n: chunked(model, 2 * keep, n), ""))
    n_prompt = 400 + len(cases[0].needles[0].question)
    message = f"a cache must store at most {0.3 * n_prompt * 3:,.0f} entries in all layers, got"
    with pytest.raises(RuntimeError, match=message):
        run_all(long_llama(), tokenizer, cases[:1], [("greedy", 0.3)], Runs(), options=FIRST)


def test_both_settings_in_one_file_are_not_mixed(tokenizer, cases, tmp_path):
    model, runs = long_llama(), Runs(tmp_path / "runs.jsonl", condense)
    later = run_all(model, tokenizer, cases, PAIRS, runs)
    first = run_all(model, tokenizer, cases, PAIRS, runs, options=FIRST)
    assert len(runs.all) == 18
    assert all("is_question_first" not in run["key"] for run in later)  # so that older files are found
    assert run_all(model, tokenizer, cases, PAIRS, Runs(runs.path), options=FIRST) == first
    assert run_all(model, tokenizer, cases, PAIRS, Runs(runs.path)) == later
    mixed = [run for pair in zip(first, later, strict=True) for run in pair]
    assert [each for each in summarize(mixed) if each["is_question_first"]] == summarize(first)
    assert [each for each in summarize(mixed) if not each["is_question_first"]] == summarize(later)
    of_full = [each["needles"]["of_full"]["value"] for each in summarize(first)]
    assert of_full[0] == 1
    unnamed = [{**run, "key": {**run["key"], "is_question_first": False}} for run in first]  # taken for the other
    assert len(summarize(unnamed + later)) == 3 < len(summarize(mixed)) == 6
    console = Console(width=200, record=True, file=io.StringIO())
    print_summaries(console, summarize(mixed))
    titles = " ".join(console.export_text().split())
    for title in ("Quality, question later: asked after", "Quality, question first: in the prompt"):
        assert titles.count(title) == 1
    assert titles.count("question first: in the prompt") == titles.count("question later: asked after") == 2


def test_shares_are_of_the_prompt(results):
    full, clustered, recalled = summarize(results)
    assert full["entries"] == recalled["entries"] == 1
    assert 0.48 < clustered["entries"] <= 0.5


def test_what_has_no_question_is_refused(tokenizer, cases):
    with pytest.raises(ValueError, match="has_attention_error must be False with is_question_first, got True"):
        Options(has_attention_error=True, is_question_first=True)
    nothing = replace(cases[0], needles=[])
    with pytest.raises(ValueError, match="case must have a question where questions come first, got none in needles"):
        run_all(long_llama(), tokenizer, [nothing], PAIRS, Runs(), options=FIRST)


def test_a_model_whose_layers_all_slide_is_refused(tokenizer, cases):
    model = tiny_gemma()
    model.config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(ValueError, match="model must have a layer that attends to everything, got one whose"):
        run_all(model, tokenizer, cases, PAIRS, Runs())
