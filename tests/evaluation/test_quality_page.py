"""The page of quality says what the numbers are: a method below its peers is reported as below."""

import json
from pathlib import Path

import pytest

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


def made_page(ours, peer, **said):
    """The page of one method of ours and one press, each (right tokens of 5, nats of what follows)."""
    from benchmarks.quality.page import Page, make_page
    from benchmarks.quality.results import collect

    runs = make_runs("full", 5, 1.0, keeps=[1.0]) + make_runs("distinctive", *ours) + make_runs("kvpress LagKV", *peer)
    return make_page(collect(runs), Page(ours={"distinctive": "ours"}, setting=["A sentence."], **said))


def section(page, title):
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


def test_page_reports_a_method_below_a_press_as_below():
    page = made_page((2, 1.2), (4, 1.1))
    beside = section(page, "Beside the best press")
    assert beside.count("LagKV: **below** (-0.400, -0.400 to -0.400)") == len(KEEPS)
    assert beside.count("LagKV: **below** (1.105, 1.105 to 1.105)") == len(KEEPS)  # of perplexity: exp 0.1
    assert "above** (" not in beside
    frontier = section(page, "The frontier of needles and perplexity")
    assert "0.5, `distinctive`: ahead of 0 of 1 presses in both, ahead in neither of: LagKV. More" in frontier
    targets = section(page, "Targets")
    assert "| keep 0.5: needle accuracy / full at least 0.97 | 0.400, **missed** by 0.570 |" in targets
    assert "| keep 0.5: needle accuracy above each of 1 presses | **missed**: LagKV, by up to 0.400 |" in targets
    assert "met |" not in targets
    assert "| 0.5 | needle token accuracy | LagKV, 0.800 | none |" in section(page, "What wins where")
    assert "`distinctive` 0.40" in section(page, "What fails")


def test_page_reports_a_method_above_a_press_as_above():
    page = made_page((5, 1.01), (3, 1.1))
    beside = section(page, "Beside the best press")
    assert beside.count("LagKV: **above** (0.400, 0.400 to 0.400)") == len(KEEPS)
    assert beside.count("LagKV: **above** (0.914, 0.914 to 0.914)") == len(KEEPS)
    assert "below** (" not in beside
    assert "ahead of 1 of 1 presses in both, ahead in neither of: none. More" in page
    assert "missed" not in section(page, "Targets")
    assert "less than" not in section(page, "What fails")


def test_page_calls_equal_methods_level():
    page = made_page((3, 1.1), (3, 1.1))
    beside = section(page, "Beside the best press")
    assert beside.count("LagKV: level, equal (0.000, 0.000 to 0.000)") == 2 * len(KEEPS)  # of tokens and of needles
    assert beside.count("LagKV: level, equal (1.000, 1.000 to 1.000)") == len(KEEPS)
    assert "| LagKV |" in section(page, "What wins where")
    assert "**missed**: LagKV, by up to 0.000" in page  # equal is not above


def test_trade_of_needles_for_perplexity_is_named():
    page = made_page((4, 1.2), (3, 1.1))
    assert "More needles than, at a higher perplexity: LagKV. Fewer needles than, at a lower perplexity: none." in page
    page = made_page((3, 1.1), (4, 1.2))
    assert "More needles than, at a higher perplexity: none. Fewer needles than, at a lower perplexity: LagKV." in page


def test_intervals_come_from_resampling_contexts():
    """Two contexts all right and two all wrong: any share of them can be drawn."""
    from benchmarks.quality.results import MEASURES, collect, compare

    mixed = [make_run("distinctive", 0.5, context, 5 * (context % 2), 1.0) for context in range(N_CONTEXTS)]
    results = collect(make_runs("full", 5, 1.0, keeps=[1.0]) + mixed)
    exact = results.summaries["distinctive", 0.5]["needles"]["exact_by_context"]
    assert (exact["value"], exact["low"], exact["high"]) == (0.5, 0.0, 1.0)
    found = compare(MEASURES["accuracy"], mixed, results.full)
    assert (found.value, found.verdict, found.side) == (-0.5, "level", "behind")
    assert compare(MEASURES["exact"], results.full, results.full).verdict == "level"


def test_unfinished_methods_and_other_weights_are_left_out():
    from benchmarks.quality.page import Page, make_page
    from benchmarks.quality.results import collect

    runs = make_runs("full", 5, 1.0, keeps=[1.0]) + make_runs("distinctive", 4, 1.1)
    runs += make_runs("kvpress LagKV", 3, 1.1)[:-1]  # keep 0.2 lacks a context
    runs += [make_run("kvpress TOVA", 0.5, context, 5, 1.0, weights="other") for context in range(N_CONTEXTS)]
    results = collect(runs)
    assert results.unfinished == [("kvpress LagKV", 0.2)]
    page = make_page(results, Page(ours={"distinctive": "ours", "distinctive-layers": "not there"}, setting=[]))
    assert "Left out, since they did not run on all contexts: kvpress LagKV 0.2." in page
    assert "Not measured: distinctive-layers." in page
    assert "TOVA" not in page
    assert "LagKV" not in section(page, "Keep 0.2")
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
    page = made_page((5, 1.0), (3, 1.1), times=times)
    assert "| `distinctive 0.25` | 6.0 % | 4.0 to 8.0 % |" in section(page, "Cost of compression")
    assert "| compression / prefill at most 0.05 | 0.060, **missed** by 0.010 |" in section(page, "Targets")


def test_depths_can_be_checked_by_hand():
    from benchmarks.quality.results import by_depth

    run = make_run("full", 1.0, 0, 3, 1.0)  # needles at 1/8, 3/8, 5/8 and 7/8
    run["needles"][3]["is_right"] = [True] * N_ANSWER
    assert by_depth([run], 6) == [0.6, None, 0.6, 0.6, None, 1.0]
    assert by_depth([run], 2) == [0.6, 0.8]


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
    monkeypatch.setattr(quality_figures, "save", lambda figure, path: figures.append(figure))
    runs = make_runs("full", 5, 1.0, keeps=[1.0]) + make_runs("distinctive", 4, 1.1) + make_runs("kvpress far", 1, 1.5)
    for number in range(19):
        runs += make_runs(f"kvpress {number}", 3, 1.1)
    quality_figures.draw_frontier(None, collect(runs), ["distinctive"], "title")
    shown, beyond = figures[0].legends
    assert [text.get_text() for text in beyond.get_texts()] == [f"kvpress far {keep}: 1.65, 0.20" for keep in KEEPS]
    looks = [(line.get_color(), line.get_marker()) for line in shown.get_lines()]
    assert len(set(looks)) == len(looks) == 22  # with the full cache's star
