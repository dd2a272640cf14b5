"""The page of quality says what the numbers are: a method below its peers is reported as below."""

import json
from pathlib import Path

import pytest

from kvcluster.evaluation.pages import fill, numbers_of_sentences, numbers_of_tables
from kvcluster.evaluation.runs import condense

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
N_CONTEXTS, N_NEEDLES, N_ANSWER = 4, 4, 5
KEEPS = (0.5, 0.25, 0.2)


def make_run(method, keep, context, n_right, nll, weights="w"):
    """A run whose needles have `n_right` right tokens each, and `nll` nats for each token that follows."""
    needle = {"is_right": [i < n_right for i in range(N_ANSWER)], "nll": [1.0 / (1 + n_right)] * N_ANSWER}
    kinds = ("digits", "words")
    key = {"method": method, "keep": keep, "case": f"case {context}", "model": weights}
    return {
        "key": key | {"is_stepwise": False, "has_attention_error": False},
        "task": "needles",
        "name": f"needles, 100 tokens, {context}",
        "n_tokens": 100,
        "n_stored": [int(100 * keep)] * 2,
        "nbytes": int(1000 * keep),
        "needles": [needle | {"kind": kinds[i % 2], "depth": (i + 0.5) / N_NEEDLES} for i in range(N_NEEDLES)],
        "following_nll": [nll + 0.01 * context] * 8,
        "seconds": {"clustering": 0.1, "asking": 1.0},
    }


def make_runs(method, n_right, nll, keeps=KEEPS):
    return [make_run(method, keep, context, n_right, nll) for keep in keeps for context in range(N_CONTEXTS)]


def made_tables(ours, peer, **facts):
    """The tables of one method of ours and one press, each (right tokens of 5, nats of what follows)."""
    from benchmarks.quality.results import collect
    from benchmarks.quality.tables import Facts, make_tables

    runs = make_runs("full", 5, 1.0, keeps=[1.0]) + make_runs("distinctive", *ours) + make_runs("kvpress LagKV", *peer)
    return make_tables(collect(runs), Facts(ours=["distinctive"], **facts))


# Numbers of QUALITY.md's sentences that are no results: the model, versions, the level of intervals; and what was
# compared token by token, before only sums were kept.
SETTING = {"135", "30", "9", "3", "2.13.0", "5.23.0", "0.5.5", "5.2.0", "95", "5e-05"}


def test_the_page_is_what_the_results_say():
    """Every table of QUALITY.md is made again from the files beside it."""
    from benchmarks.quality.run import read_results
    from benchmarks.quality.tables import make_tables

    page = (BENCHMARKS / "quality" / "QUALITY.md").read_text()
    assert fill(page, make_tables(*read_results())) == page


def test_numbers_of_sentences_are_those_of_tables():
    page = (BENCHMARKS / "quality" / "QUALITY.md").read_text()
    stray = numbers_of_sentences(page) - numbers_of_tables(page)
    assert stray == SETTING
    assert {"96", "0.046"} <= numbers_of_sentences(page)
    assert "0.0461" in numbers_of_sentences(page.replace("by 0.046.", "by 0.0461.")) - numbers_of_tables(page)


def test_a_page_with_other_marks_than_tables_is_refused():
    page = "<!-- table: one -->\n<!-- end -->\n"
    with pytest.raises(ValueError, match=r"page must have a mark for each of \['two'\], got \['one'\]"):
        fill(page, {"two": ""})


@pytest.mark.parametrize("folder", sorted(path for path in BENCHMARKS.iterdir() if (path / "run.py").exists()))
def test_every_benchmark_says_what_it_asks_and_commits_little(folder):
    text = (folder / "README.md").read_text()
    for part in ("**Command:**", "**Time:**", "**Writes:**", "**Quoted in:**", f"benchmarks/{folder.name}/run.py"):
        assert part in text
    for path in (folder / "results").glob("*"):
        assert path.stat().st_size <= 300_000, path


def test_page_reports_a_method_below_a_press_as_below():
    tables = made_tables((2, 1.2), (4, 1.1))
    beside = tables["beside"]
    assert beside.count("LagKV: **below** (-0.400, -0.400 to -0.400)") == len(KEEPS)
    assert beside.count("LagKV: **below** (1.105, 1.105 to 1.105)") == len(KEEPS)  # of perplexity: exp 0.1
    assert "above** (" not in beside
    frontier = tables["frontier"]
    assert "| 0.5 | `distinctive` | 0 of 1 | LagKV | none | none |" in frontier
    targets = tables["targets"]
    assert "| keep 0.5: needle accuracy / full at least 0.97 | 0.400, **missed** by 0.570 |" in targets
    assert "| keep 0.5: needle accuracy above each of 1 presses | **missed**: LagKV, by up to 0.400 |" in targets
    assert "met |" not in targets
    assert "| 0.5 | needle token accuracy | LagKV, 0.800 | none |" in tables["wins"]
    assert "`distinctive` 0.40" in tables["failed"]


def test_page_reports_a_method_above_a_press_as_above():
    tables = made_tables((5, 1.01), (3, 1.1))
    beside = tables["beside"]
    assert beside.count("LagKV: **above** (0.400, 0.400 to 0.400)") == len(KEEPS)
    assert beside.count("LagKV: **above** (0.914, 0.914 to 0.914)") == len(KEEPS)
    assert "below** (" not in beside
    assert "| 0.5 | `distinctive` | 1 of 1 | none | none | none |" in tables["frontier"]
    assert "missed" not in tables["targets"]
    assert tables["failed"].count("| none |") == len(KEEPS)


def test_page_calls_equal_methods_level():
    tables = made_tables((3, 1.1), (3, 1.1))
    beside = tables["beside"]
    assert beside.count("LagKV: level, equal (0.000, 0.000 to 0.000)") == 2 * len(KEEPS)  # of tokens and of needles
    assert beside.count("LagKV: level, equal (1.000, 1.000 to 1.000)") == len(KEEPS)
    assert "| LagKV |" in tables["wins"]
    assert "**missed**: LagKV, by up to 0.000" in tables["targets"]  # equal is not above


def test_trade_of_needles_for_perplexity_is_named():
    tables = made_tables((4, 1.2), (3, 1.1))
    assert "| 0.5 | `distinctive` | 0 of 1 | none | LagKV | none |" in tables["frontier"]
    tables = made_tables((3, 1.1), (4, 1.2))
    assert "| 0.5 | `distinctive` | 0 of 1 | none | none | LagKV |" in tables["frontier"]


def test_intervals_come_from_resampling_contexts():
    """Two contexts all right and two all wrong: any share of them can be drawn."""
    from benchmarks.quality.results import MEASURES, collect, compare

    mixed = [make_run("distinctive", 0.5, context, 5 * (context % 2), 1.0) for context in range(N_CONTEXTS)]
    results = collect(make_runs("full", 5, 1.0, keeps=[1.0]) + mixed)
    exact = results.summaries["distinctive", 0.5]["needles"]["exact_by_context"]
    assert (exact["value"], exact["low"], exact["high"]) == (0.5, 0.0, 1.0)
    found = compare(MEASURES["accuracy"], results.runs["distinctive", 0.5], results.full)
    assert (found.value, found.verdict, found.side) == (-0.5, "level", "behind")
    assert compare(MEASURES["exact"], results.full, results.full).verdict == "level"


def test_unfinished_methods_and_other_weights_are_left_out():
    from benchmarks.quality.results import collect
    from benchmarks.quality.tables import Facts, make_tables

    runs = make_runs("full", 5, 1.0, keeps=[1.0]) + make_runs("distinctive", 4, 1.1)
    runs += make_runs("kvpress LagKV", 3, 1.1)[:-1]  # keep 0.2 lacks a context
    runs += [make_run("kvpress TOVA", 0.5, context, 5, 1.0, weights="other") for context in range(N_CONTEXTS)]
    results = collect(runs)
    assert results.unfinished == [("kvpress LagKV", 0.2)]
    tables = make_tables(results, Facts(ours=["distinctive", "distinctive-heads"]))
    assert "Left out, since they did not run on all contexts: kvpress LagKV 0.2." in tables["unfinished"]
    assert "Not measured: distinctive-heads." in tables["unfinished"]
    assert not any("TOVA" in made for made in tables.values())
    assert "LagKV" not in tables["keep 0.2"]
    with pytest.raises(
        ValueError, match="runs must have a context that the full cache and all of ours ran on, got none"
    ):
        collect(make_runs("distinctive", 4, 1.1))


def test_contexts_that_ours_did_not_finish_are_left_out_of_all():
    from benchmarks.quality.results import collect

    runs = (
        make_runs("full", 5, 1.0, keeps=[1.0])
        + make_runs("distinctive", 4, 1.1)[:-1]
        + make_runs("kvpress TOVA", 3, 1.1)
    )
    results = collect(runs, ours=["distinctive", "chunked"])
    assert len(results.full) == N_CONTEXTS - 1
    assert {len(group) for group in results.runs.values()} == {N_CONTEXTS - 1}
    assert results.unfinished == []


def test_cost_is_a_share_of_prefill_by_rounds():
    times = {
        "tokens": 100,
        "threads": 1,
        "seconds": {"prefill": [10.0, 20.0, 10.0], "full": [0.0, 0.0, 0.0], "distinctive 0.25": [0.4, 1.6, 0.6]},
    }
    tables = made_tables((5, 1.0), (3, 1.1), times=times)
    assert "| `distinctive 0.25` | 6.0 % | 4.0 to 8.0 % |" in tables["cost"]
    assert "| compression / prefill at most 0.05 | 0.060, **missed** by 0.010 |" in tables["targets"]


def test_depths_can_be_checked_by_hand():
    from benchmarks.quality.results import by_depth

    run = make_run("full", 1.0, 0, 3, 1.0)  # needles at 1/8, 3/8, 5/8 and 7/8
    run["needles"][3]["is_right"] = [True] * N_ANSWER
    assert by_depth([condense(run, 6)]) == [0.6, None, 0.6, 0.6, None, 1.0]
    assert by_depth([condense(run, 2)]) == [0.6, 0.8]
    assert by_depth([condense(run, 2)] * 3) == [0.6, 0.8]


def test_figures_are_drawn(tmp_path):
    from benchmarks.quality.figures import draw_depths, draw_frontier
    from benchmarks.quality.results import collect

    runs = (
        make_runs("full", 5, 1.0, keeps=[1.0]) + make_runs("distinctive", 4, 1.1) + make_runs("kvpress LagKV", 3, 1.1)
    )
    results = collect(json.loads(json.dumps(runs)))
    draw_frontier(tmp_path / "frontier.png", results, ["distinctive"], "title")
    draw_depths(tmp_path / "depths.png", results, ["distinctive"], "title")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("frontier.png", "depths.png"))


def test_what_lies_beyond_the_figure_is_named_and_no_two_presses_look_alike(monkeypatch):
    from benchmarks.quality import figures as quality_figures
    from benchmarks.quality.results import collect

    figures = []
    monkeypatch.setattr(quality_figures, "save", lambda figure, path, dpi: figures.append(figure))
    runs = make_runs("full", 5, 1.0, keeps=[1.0]) + make_runs("distinctive", 4, 1.1) + make_runs("kvpress far", 1, 1.5)
    for number in range(19):
        runs += make_runs(f"kvpress {number}", 3, 1.1)
    quality_figures.draw_frontier(None, collect(runs), ["distinctive"], "title")
    shown, beyond = figures[0].legends
    assert [text.get_text() for text in beyond.get_texts()] == [f"kvpress far {keep}: 1.65, 0.20" for keep in KEEPS]
    looks = [(line.get_color(), line.get_marker()) for line in shown.get_lines()]
    assert len(set(looks)) == len(looks) == 22  # with the full cache's star
