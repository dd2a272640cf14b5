"""The tables of the quality page that judge: ours beside the presses, targets, what wins and what fails."""

import statistics
from typing import Any

from benchmarks.quality.cells import beside, best, peers, present, short, shown, value
from benchmarks.quality.results import MEASURES, Comparison, Results, by_depth
from kvcluster.evaluation.pages import table

__all__ = [
    "TARGETS",
    "beside_table",
    "cost_ratios",
    "failed_table",
    "frontier_table",
    "target_table",
    "weakest_table",
    "win_table",
]

TARGETS = {0.5: (0.97, 1.03), 0.25: (0.90, 1.06), 0.2: (0.85, None)}
# by share kept: least needle token accuracy and most perplexity, both over the full cache's
MOST_COST = 0.05  # of prefill, for compression
FAILED = 0.5  # of the full cache's token accuracy: below it a method is listed among what fails


def beside_table(results: Results, ours: list[str]) -> str:
    rows = []
    for keep in results.keeps:
        names = peers(results, keep)
        for name in present(results, ours, keep) if names else []:
            cells = [f"{keep:g}", f"`{name}`"]
            for measure in ("accuracy", "exact", "perplexity"):
                peer = best(results, names, keep, measure)
                cells.append(f"{short(peer)}: {verdict(beside(results, name, peer, keep, measure))}")
            rows.append(cells)
    return table(["kept", "ours", "needle token accuracy", "exact needles", "perplexity"], rows)


def verdict(comparison: Comparison) -> str:
    """For a table: the word with its evidence."""
    words = {"above": "**above**", "below": "**below**", "level": f"level, {comparison.side}"}
    interval = "" if comparison.low is None else f", {comparison.low:.3f} to {comparison.high:.3f}"
    return f"{words[comparison.verdict]} ({comparison.value:.3f}{interval})"


def frontier_table(results: Results, ours: list[str]) -> str:
    """Each point of ours beside each press at the same entries, by the values alone."""
    rows = []
    for keep in results.keeps:
        names = peers(results, keep)
        for name in present(results, ours, keep) if names else []:
            leads = {
                peer: tuple(beside(results, name, peer, keep, m).side == "ahead" for m in ("accuracy", "perplexity"))
                for peer in names
            }
            groups = [
                ", ".join(short(peer) for peer, is_ahead in leads.items() if is_ahead == pair) or "none"
                for pair in ((False, False), (True, False), (False, True))
            ]
            n_behind = sum(is_ahead == (True, True) for is_ahead in leads.values())
            rows.append([f"{keep:g}", f"`{name}`", f"{n_behind} of {len(names)}", *groups])
    head = ["kept", "ours", "ahead in both of", "ahead in neither of", "more needles, higher perplexity than"]
    return table([*head, "fewer needles, lower perplexity than"], rows)


def target_table(results: Results, new: list[str], times: dict[str, Any] | None) -> str:
    names = [name for name in new if any(name == method for method, _ in results.runs)]
    rows = []
    for keep, (least, most) in TARGETS.items():
        shown = [name for name in names if (name, keep) in results.runs]
        if not shown:
            continue
        cells = {
            f"keep {keep:g}: needle accuracy / full at least {least:g}": [
                judged(results.summaries[name, keep]["needles"]["of_full"]["value"], least, is_least=True)
                for name in shown
            ]
        }
        if most is not None:
            cells[f"keep {keep:g}: perplexity / full at most {most:g}"] = [
                judged(results.summaries[name, keep]["perplexity"]["of_full"]["value"], most, is_least=False)
                for name in shown
            ]
        if peers(results, keep):
            cells[f"keep {keep:g}: needle accuracy above each of {len(peers(results, keep))} presses"] = [
                above_all(results, name, keep) for name in shown
            ]
        by_name = {text: dict(zip(shown, verdicts, strict=True)) for text, verdicts in cells.items()}
        rows += [[text, *(verdicts.get(name, "not measured") for name in names)] for text, verdicts in by_name.items()]
    if times and names:
        ratios = cost_ratios(times)
        cells = []
        for name in names:
            medians = [statistics.median(x) for label, x in ratios.items() if label.rsplit(" ", 1)[0] == name]
            cells.append(judged(max(medians), MOST_COST, is_least=False) if medians else "not measured")
        rows.append([f"compression / prefill at most {MOST_COST:g}", *cells])
    return table(["target", *(f"`{name}`" for name in names)], rows)


def judged(measured: float, bound: float, *, is_least: bool) -> str:
    is_met = measured >= bound if is_least else measured <= bound
    return f"{measured:.3f}, met" if is_met else f"{measured:.3f}, **missed** by {abs(measured - bound):.3f}"


def above_all(results: Results, name: str, keep: float) -> str:
    behind = [peer for peer in peers(results, keep) if beside(results, name, peer, keep, "accuracy").side != "ahead"]
    if not behind:
        return "met"
    worst = best(results, behind, keep, "accuracy")
    gap = value(results, worst, keep, "accuracy") - value(results, name, keep, "accuracy")
    return f"**missed**: {', '.join(short(peer) for peer in behind)}, by up to {gap:.3f}"


def win_table(results: Results, ours: list[str]) -> str:
    rows = []
    for keep in results.keeps:
        names = [*present(results, ours, keep), *peers(results, keep)]
        for key, measure in MEASURES.items():
            first = best(results, names, keep, key)
            level = [
                name for name in names if name != first and beside(results, first, name, keep, key).verdict == "level"
            ]
            winner = f"{shown(first, ours)}, {value(results, first, keep, key):.3f}"
            rows.append([f"{keep:g}", measure.name, winner, ", ".join(shown(name, ours) for name in level) or "none"])
    return table(["kept", "measure", "best", "level with it (the interval leaves open which is better)"], rows)


def failed_table(results: Results, ours: list[str]) -> str:
    """Methods that keep less than half of the full cache's needle accuracy, with their share."""
    rows = []
    for keep in results.keeps:
        names = [*present(results, ours, keep), *peers(results, keep)]
        of_full = {name: results.summaries[name, keep]["needles"]["of_full"]["value"] for name in names}
        failed = [f"{shown(name, ours)} {share:.2f}" for name, share in of_full.items() if share < FAILED]
        rows.append([f"{keep:g}", ", ".join(failed) or "none"])
    return table(["kept", f"less than {FAILED:g} of the full cache's needle accuracy"], rows)


def weakest_table(results: Results, ours: list[str]) -> str:
    rows = []
    for keep in results.keeps:
        for name in present(results, ours, keep):
            shares = by_depth(results.runs[name, keep])
            lowest, place = min((share, place) for place, share in enumerate(shares) if share is not None)
            depths = f"{100 * place / len(shares):.0f} to {100 * (place + 1) / len(shares):.0f} %: {lowest:.2f}"
            kinds = results.summaries[name, keep]["needles"]["by_kind"]
            kind = min(kinds, key=lambda kind: kinds[kind]["token_accuracy"])
            rows.append([f"{keep:g}", f"`{name}`", depths, f"{kind}: {kinds[kind]['token_accuracy']:.2f}"])
    return table(["kept", "ours", "weakest depths: token accuracy", "weakest kind: token accuracy"], rows)


def cost_ratios(times: dict[str, Any]) -> dict[str, list[float]]:
    """Compression over prefill, of each round."""
    seconds = times["seconds"]
    return {
        label: [a / b for a, b in zip(compression, seconds["prefill"], strict=True)]
        for label, compression in seconds.items()
        if label != "prefill"
    }
