"""Runs go on where they stopped, budgets are held, summaries can be checked by hand, files of others are understood."""

import json
import math
import multiprocessing
import resource
from dataclasses import replace

import pytest
from agreement import numbers_agree, scores_agree
from evaluation_inputs import character_tokenizer, long_llama, short_text
from scipy.stats import binomtest

from kvcluster.evaluation.quality import METHODS, Method, Options, needle_cases, run_all, summarize, task_case
from kvcluster.evaluation.quality import run as run_module
from kvcluster.evaluation.quality.folders import longbench_cases, ruler_cases
from kvcluster.evaluation.quality.methods import chunked
from kvcluster.evaluation.quality.metrics import METRICS, rouge_l
from kvcluster.evaluation.quality.run import check_methods
from kvcluster.evaluation.runs import Runs, condense
from kvcluster.evaluation.statistics import wilson
from kvcluster.evaluation.texts import encode

NO_OPTIONS = Options()
PAIRS = [("full", 1.0), ("chunked", 0.5), ("recall", 0.5)]


@pytest.fixture(scope="module")
def model():
    return long_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def cases(tokenizer):
    text = encode(tokenizer, short_text())
    made = needle_cases(tokenizer, text, "reporting", lengths=[400], n_contexts=2, n_needles=2, n_following=20)
    return [*made, task_case("single", tokenizer, short_text(), text, "reporting", 0, 400)]


def without_seconds(results):
    return [{name: value for name, value in each.items() if name != "seconds"} for each in results]


@pytest.mark.slow
def test_runs_go_on_where_they_stopped(model, tokenizer, cases, tmp_path, monkeypatch):
    measured = []
    measure = run_module.measure
    monkeypatch.setattr(run_module, "measure", lambda *args: measured.append(args[-2]["method"]) or measure(*args))
    path = tmp_path / "runs.jsonl"

    def run(cases=cases, options=NO_OPTIONS):
        measured.clear()
        return run_all(model, tokenizer, cases, PAIRS, Runs(path), options=options)

    first = run()
    assert measured == ["full", "chunked", "recall"] * 3
    assert [each["key"]["method"] for each in first] == measured
    lines = path.read_text().splitlines(keepends=True)
    assert run() == first
    assert measured == []
    path.write_text("".join(lines[:7]) + lines[7][:50])  # as if the machine had gone down
    again = run()
    assert measured == ["chunked", "recall"]
    assert without_seconds(again) == without_seconds(first)
    assert path.read_text().startswith("".join(lines[:7]))
    assert without_seconds(map(json.loads, path.read_text().splitlines())) == without_seconds(first)
    run([replace(cases[0], following=cases[0].following[:10]), *cases[1:]])
    assert measured == ["full", "chunked", "recall"]  # what is asked has changed
    with_errors = run(options=Options(has_attention_error=True))
    assert len(measured) == 9
    assert [sum(each["attention_errors"]) > 0 for each in with_errors[:6]] == [False, True, True] * 2
    path.write_text("{]\n" + lines[0])
    with pytest.raises(ValueError, match=r"runs.jsonl:1 must be JSON"):
        run()


def test_what_a_run_says_of_itself_is_true(model, tokenizer, cases):
    """400 tokens are 4 sinks, 5 chunks of 64 and 76 recent ones; half of them is room for 24 entries a chunk."""
    full, clustered, recalled = run_all(model, tokenizer, cases[:1], PAIRS, Runs())
    assert [each["n_stored"] for each in (full, clustered, recalled)] == [[400] * 3, [200] * 3, [400] * 3]
    assert full["nbytes"] == 3 * 2 * 2 * 400 * 16 * 4
    assert clustered["nbytes"] == 3 * 2 * 200 * (2 * 16 * 4 + 4)
    assert [each["key"]["is_stepwise"] for each in (full, clustered, recalled)] == [False, False, True]
    assert len(full["following_nll"]) == 20
    assert [len(needle["nll"]) for needle in full["needles"]] == [len(needle.answer) for needle in cases[0].needles]


def test_a_method_that_exceeds_its_budget_is_found_out(model, tokenizer, cases, monkeypatch):
    monkeypatch.setitem(METHODS, "greedy", Method(lambda model, keep, n: chunked(model, 2 * keep, n), ""))
    with pytest.raises(RuntimeError, match=r"a cache must store at most 360 entries in all layers, got 720"):
        run_all(model, tokenizer, cases[:1], [("greedy", 0.3)], Runs())


def test_methods_are_checked():
    assert check_methods([("full", 0.5), ("chunked", 0.5), ("full", 0.2)]) == [("full", 1.0), ("chunked", 0.5)]
    with pytest.raises(ValueError, match=r"method must be of full, chunked, .*, distinctive, .*, got 'best'"):
        check_methods([("best", 0.5)])
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 1.5"):
        check_methods([("chunked", 1.5)])


def test_wilson_is_that_of_scipy():
    for n_right, n in ((0, 12), (12, 12), (5, 7), (50, 96)):
        theirs = binomtest(n_right, n).proportion_ci(method="wilson")
        assert numbers_agree(wilson(n_right, n), [theirs.low, theirs.high])


def test_summaries_can_be_checked_by_hand():
    def result(method, case, rights, nll, following):
        needles = [{"kind": "digits", "depth": 0.5, "is_right": each, "nll": [nll] * len(each)} for each in rights]
        return {
            "key": {"method": method, "keep": 1.0 if method == "full" else 0.5, "case": case},
            "task": "needles",
            "n_tokens": 10,
            "n_stored": [10, 10] if method == "full" else [5, 3],
            "nbytes": 100 if method == "full" else 40,
            "needles": needles,
            "following_nll": following,
            "seconds": {"clustering": 1.0, "asking": 2.0},
        }

    results = [
        result("full", "a", [[True, True], [True, True]], 0.0, [1.0, 1.0]),
        result("half", "a", [[True, True], [True, False]], 1.0, [1.0, 2.0]),
        result("full", "b", [[True, False]], 0.5, [3.0, 3.0]),
        result("half", "b", [[False, False]], 4.0, [3.0, 4.0]),
        result("new", "a", [[True, True], [True, True]], 0.0, [1.0, 1.0]),
    ]
    full, half, new = summarize(results)
    assert (half["n_contexts"], half["entries"], half["bytes"]) == (2, 0.4, 0.4)
    needles = half["needles"]
    assert (needles["n"], needles["token_accuracy"]["value"], needles["exact"]["value"]) == (3, 0.5, 1 / 3)
    assert (needles["token_accuracy"]["low"], needles["token_accuracy"]["high"]) == (0, 0.75)  # b twice, a twice
    assert needles["of_full"]["value"] == 0.6
    assert needles["nll"]["value"] == 2
    assert needles["by_kind"] == {"digits": {"n": 3, "token_accuracy": 0.5, "exact": 1 / 3, "nll": 2}}
    perplexities = [half["perplexity"][name]["value"] for name in ("value", "of_full")]
    assert numbers_agree(perplexities, [math.exp(10 / 4), math.exp(2 / 4)])
    assert full["perplexity"]["of_full"] == {"value": 1, "low": 1, "high": 1}
    assert new["needles"]["token_accuracy"] == {"value": 1, "low": None, "high": None}  # of one context
    [alone] = summarize(results[1:2])
    assert (alone["bytes"], alone["perplexity"]["of_full"]["value"], alone["needles"]["of_full"]["value"]) == (
        None,
    ) * 3


def test_condensed_runs_say_the_same_and_no_more_of_each_token(model, tokenizer, cases, tmp_path):
    raw = run_all(model, tokenizer, cases[:2], PAIRS, Runs())
    store = Runs(tmp_path / "runs.jsonl", condense)
    condensed = run_all(model, tokenizer, cases[:2], PAIRS, store)
    assert without_seconds(condensed) == without_seconds(map(condense, raw))
    assert [condense(each) for each in condensed] == condensed
    assert Runs(store.path).all == condensed
    assert run_all(model, tokenizer, cases[:2], PAIRS, Runs(store.path, condense)) == condensed
    assert without_seconds(summarize(raw)) == without_seconds(summarize(condensed))
    for each, full in zip(condensed, raw, strict=True):
        needles = full["needles"]
        assert each["following"]["n"] == len(full["following_nll"])
        assert sum(right for right, _ in each["needles"]["depths"]) == sum(sum(x["is_right"]) for x in needles)
        assert sum(n for _, n in each["needles"]["depths"]) == sum(len(x["nll"]) for x in needles)
        assert each["stored"] | {"entries": sum(full["n_stored"])} == each["stored"]


@pytest.mark.parametrize(
    ("metric", "text", "answers", "score"),
    [
        ("match all", "It is AMBER and 12.", ["amber", "13"], 0.5),
        ("match part", "It is AMBER and 12.", ["amber", "13"], 1),
        ("F1", "The small red fox!", ["a red fox", "dog"], 0.8),  # small red fox against red fox
        ("F1", "", ["fox"], 0),
        ("F1 of first line", "\nred fox\nand more", ["red fox"], 1),
        ("ROUGE-L of first line", "a b c\nd", ["a c"], 0.8),
        ("classification", "A city or a state", ["city"], 0.5),
        ("classification", "A big city", ["big city"], 1),  # "city" is part of it
        ("classification", "dog", ["city"], 0),
        ("count", "There are 7, or 8.", ["7"], 0.5),
        ("count", "none", ["7"], 0),
        ("paragraph", "Paragraph 7 I think", ["Paragraph 7"], 1),
        ("paragraph", "17", ["Paragraph 7"], 0),
        ("code similarity", "\n# note\nx = 1\ny = 2", ["x = 2"], 0.8),
    ],
)
def test_metrics_can_be_checked_by_hand(metric, text, answers, score):
    classes = ["city", "state", "big city", "dog"]
    assert scores_agree(METRICS[metric](text, answers, classes), score)


def test_rouge_counts_distinct_words_of_common_subsequences():
    assert scores_agree(rouge_l("a x b. c", "a b c"), 2 * 0.75 / 1.75)  # 3 of 4 words, all 3
    assert scores_agree(rouge_l("b a", "a b"), 0.5)
    assert scores_agree(rouge_l("a a a", "a"), 1)
    assert rouge_l("", "a") == rouge_l("a", "...") == 0


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


QA = {"input": "Who?", "context": "Ann went home. " * 40, "answers": ["Ann"], "length": 120, "dataset": "hotpotqa"}
QA |= {"language": "en", "all_classes": None, "_id": "1"}


def test_longbench_files_are_read(tokenizer, tmp_path):
    write_lines(tmp_path / "data" / "hotpotqa_e.jsonl", QA, QA, QA)
    write_lines(tmp_path / "data" / "trec.jsonl", QA | {"all_classes": ["Person", "Place"], "answers": ["Person"]})
    qa, _, trec = longbench_cases(tokenizer, tmp_path, n_tokens=101, n_cases=2)
    assert tokenizer.decode(qa.tokens) == QA["context"][:51] + QA["context"][-50:]
    assert "Question: Who?" in tokenizer.decode(qa.prompts[0].question)
    assert (qa.task, qa.prompts[0].metric, qa.prompts[0].n_new) == ("longbench hotpotqa", "F1", 32)
    assert (trec.prompts[0].metric, trec.prompts[0].classes) == ("classification", ["Person", "Place"])
    write_lines(tmp_path / "config" / "dataset2prompt.json", {"hotpotqa": "Read: {context}\nAsked: {input}\n"})
    write_lines(tmp_path / "config" / "dataset2maxlen.json", {"hotpotqa": 5})
    qa, _, _ = longbench_cases(tokenizer, tmp_path, n_tokens=1000, n_cases=2)
    assert tokenizer.decode(qa.tokens) == "Read: " + QA["context"]
    assert (tokenizer.decode(qa.prompts[0].question), qa.prompts[0].n_new) == ("\nAsked: Who?\n", 5)
    write_lines(tmp_path / "config" / "dataset2prompt.json", {"hotpotqa": "{input} {context}"})
    with pytest.raises(ValueError, match="must have its context before its question"):
        longbench_cases(tokenizer, tmp_path, n_tokens=1000, n_cases=1)


def test_ruler_files_are_read(tokenizer, tmp_path):
    niah = "Remember.\nWhat else. One of the numbers for x is: 17.\nWhat is the special magic number for x in the text?"
    write_lines(
        tmp_path / "niah_single_1" / "validation.jsonl",
        {"index": 0, "input": niah, "outputs": ["17"], "length": 99, "answer_prefix": " It is"},
    )
    write_lines(
        tmp_path / "qa_1.jsonl", {"index": 0, "input": "Docs\n\nQuestion: Who?", "outputs": ["A", "B"], "length": 9}
    )
    first, second = ruler_cases(tokenizer, tmp_path, n_tokens=200, n_cases=5)
    assert tokenizer.decode(first.tokens) == niah[: niah.rindex("\nWhat")]
    assert tokenizer.decode(first.prompts[0].question) == niah[niah.rindex("\nWhat") :] + " It is"
    assert (first.task, first.prompts[0].metric, first.prompts[0].n_new) == (
        "ruler file niah_single_1",
        "match all",
        128,
    )
    assert (second.prompts[0].metric, second.prompts[0].answers) == ("match part", ["A", "B"])


def test_files_that_cannot_be_read_are_refused(tokenizer, tmp_path):
    def fails(message, read, **changed):
        with pytest.raises(ValueError, match=message):
            read(tokenizer, tmp_path, **{"n_tokens": 100, "n_cases": 9} | changed)

    fails("folder must have files of JSON lines", longbench_cases)
    write_lines(tmp_path / "mine.jsonl", {"input": "no question", "outputs": ["x"]})
    fails("files must be named as datasets of LongBench, .*, got mine.jsonl", longbench_cases)
    fails("input must have a question, .*, got none in .*mine.jsonl:1", ruler_cases)
    write_lines(tmp_path / "mine.jsonl", {"input": "x" * 101 + "\nQuestion: y", "outputs": ["x"]})
    fails("context must have at most 100 tokens, got 101 in .*mine.jsonl:1", ruler_cases)
    write_lines(tmp_path / "mine.jsonl", {"input": "a\nQuestion: y"})
    fails("mine.jsonl:1 must have the fields input, outputs, got none called outputs", ruler_cases)
    (tmp_path / "mine.jsonl").write_text("{]")
    fails("mine.jsonl:1 must be JSON", ruler_cases)


def test_taking_out_a_half_written_line_writes_nothing(tmp_path):
    """So that neither a killed process nor a full disk loses the runs before it."""
    path = tmp_path / "runs.jsonl"
    lines = "".join(json.dumps({"key": {"number": number}}) + "\n" for number in range(100))
    path.write_text(lines + '{"key": {"num')

    def read_without_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        assert len(Runs(path).all) == 100

    child = multiprocessing.get_context("fork").Process(target=read_without_room)
    child.start()
    child.join(30)
    assert (child.exitcode, path.read_text()) == (0, lines)
