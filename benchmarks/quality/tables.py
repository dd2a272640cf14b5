"""The tables of the quality page, by the names of their marks; the sentences beside them are written by hand."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmarks.published.tables import peers_table
from benchmarks.quality.cells import best, number, peers, present, value
from benchmarks.quality.results import Results, Run
from benchmarks.quality.verdicts import (
    beside_table,
    cost_ratios,
    failed_table,
    frontier_table,
    target_table,
    weakest_table,
    win_table,
)
from kvcluster.evaluation.pages import table
from kvcluster.evaluation.report import with_interval

__all__ = ["Facts", "make_tables"]


@dataclass(frozen=True)
class Facts:
    """What tables need besides the runs of methods.

    Attributes
    ----------
    ours : names of our methods in their order; those with targets are all but "chunked".
    elsewhere : runs of the full cache in the presses' environment, condensed.
    times : of `time_compression`, or None.
    presses : how each press was made, by name.
    left_out : presses that were not run, with the reason.
    both : runs in both settings, of ours and of the presses: those of docs/published.md and on its contexts.
    """

    ours: list[str]
    elsewhere: list[Run] = field(default_factory=list)
    times: dict[str, Any] | None = None
    presses: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    both: tuple[list[Run], list[Run]] | None = None


def make_tables(results: Results, facts: Facts) -> dict[str, str]:
    """Each as Markdown."""
    ours = facts.ours
    return {
        "setting": setting_table(results),
        "environments": environment_table(results, facts.elsewhere),
        "unfinished": unfinished(results, ours),
        "beside": beside_table(results, ours),
        **{f"keep {keep:g}": method_table(results, ours, keep) for keep in results.keeps},
        "both settings": peers_table(*facts.both) if facts.both else "",
        "frontier": frontier_table(results, ours),
        "kinds": kind_table(results, ours),
        "targets": target_table(results, [name for name in ours if name != "chunked"], facts.times),
        "wins": win_table(results, ours),
        "failed": failed_table(results, ours),
        "weakest": weakest_table(results, ours),
        "cost": cost_table(facts.times),
        "presses": "\n".join(f"- {name}: `{press}`" for name, press in facts.presses.items()),
        "not run": "\n".join(f"- {name}: {reason}." for name, reason in facts.left_out.items()),
    }


def setting_table(results: Results) -> str:
    """The contexts, and the full cache's answers."""
    full = results.summaries["full", 1.0]
    needles, perplexity = full["needles"], full["perplexity"]
    lengths = " and ".join(f"{x:,}" for x in sorted({run["n_tokens"] for run in results.full}))
    head = ["contexts", "tokens of each", "needles in all", "needle token accuracy", "exact needles"]
    head += ["nats a needle token", "perplexity", "tokens that follow"]
    cells = [f"{full['n_contexts']}", lengths, f"{needles['n']}", with_interval(needles["token_accuracy"], to="-")]
    cells += [with_interval(needles["exact_by_context"], to="-"), number(needles["nll"])]
    cells += [number(perplexity["value"]), f"{perplexity['n_tokens']:,}"]
    return table(head, [cells])


def environment_table(results: Results, elsewhere: list[Run]) -> str:
    """The full cache here and in the presses' environment, by sums of each context."""
    full = {run["key"]["case"]: run for run in results.full}
    pairs = [(full[run["key"]["case"]], run) for run in elsewhere if run["key"]["case"] in full]
    counts = [[parts_of(run) for run in pair] for pair in pairs]
    differing = sum(a != b for ours, theirs in counts for a, b in zip(ours, theirs, strict=True))
    most = max((abs(a["following"]["nll"] - b["following"]["nll"]) / a["following"]["n"] for a, b in pairs), default=0)
    head = ["contexts", "kinds and depths with other numbers of right tokens", "most difference, nats a token"]
    return table(head, [[f"{len(pairs)}", f"{differing}", f"{most:.1e}"]])


def parts_of(run: Run) -> list[int]:
    """Right tokens of each kind and of each depth."""
    return [kind["right"] for kind in run["needles"]["kinds"].values()] + [part[0] for part in run["needles"]["depths"]]


def unfinished(results: Results, ours: list[str]) -> str:
    names = ", ".join(f"{name} {keep:g}" for name, keep in results.unfinished) or "none"
    missing = ", ".join(name for name in ours if not any(name == method for method, _ in results.runs)) or "none"
    return f"Left out, since they did not run on all contexts: {names}. Not measured: {missing}."


def method_table(results: Results, ours: list[str], keep: float) -> str:
    names = ["full", *present(results, ours, keep)]
    ordered = sorted(peers(results, keep), key=lambda name: -value(results, name, keep, "accuracy"))
    rows = []
    for name in [*names, *ordered]:
        pair = (name, 1.0 if name == "full" else keep)
        summary, stored = results.summaries[pair], [run["stored"] for run in results.runs[pair]]
        needles, perplexity = summary["needles"], summary["perplexity"]
        entries = f"{sum(x['entries'] for x in stored) / sum(x['layers'] for x in stored):,.0f}"
        least, most = min(x["least"] for x in stored), max(x["most"] for x in stored)
        if least < most:
            entries += f" ({least:,.0f} to {most:,.0f})"
        rows.append(
            [
                f"`{name}`" if name in ("full", *ours) else name,
                with_interval(needles["of_full"], to="-"),
                with_interval(needles["token_accuracy"], to="-"),
                with_interval(needles["exact_by_context"], to="-"),
                with_interval(needles["nll"], to="-"),
                with_interval(perplexity["of_full"], to="-"),
                entries,
                f"{summary['bytes']:.3f}",
            ]
        )
    head = ["method", "needle accuracy / full", "token accuracy", "exact", "nats", "perplexity / full"]
    return table([*head, "entries a layer and head", "bytes / full"], rows)


def kind_table(results: Results, ours: list[str]) -> str:
    rows = []
    for keep in results.keeps:
        peer = best(results, peers(results, keep), keep, "accuracy")
        for name in [*present(results, ours, keep), *([peer] if peer else [])]:
            kinds = results.summaries[name, keep]["needles"]["by_kind"]
            cells = [f"{kinds[kind]['token_accuracy']:.3f} / {kinds[kind]['exact']:.2f}" for kind in sorted(kinds)]
            rows.append([f"{keep:g}", f"`{name}`" if name in ours else name, *cells])
    full = results.summaries["full", 1.0]["needles"]["by_kind"]
    cells = [f"{full[kind]['token_accuracy']:.3f} / {full[kind]['exact']:.2f}" for kind in sorted(full)]
    head = ["kept", "method", *(f"{kind} ({full[kind]['n']})" for kind in sorted(full))]
    return table(head, [["all", "`full`", *cells], *rows])


def cost_table(times: dict[str, Any] | None) -> str:
    """Time of compression over the time of the prefill; medians of rounds, and from the least to the most."""
    if times is None:
        return "Not measured."
    rows = []
    for label, ratios in cost_ratios(times).items():
        spread = f"{100 * min(ratios):.1f} to {100 * max(ratios):.1f} %"
        name = "storing without compressing" if label == "full" else f"`{label}`"
        rows.append([name, f"{100 * statistics.median(ratios):.1f} %", spread])
    head = f"method and share kept; {times['tokens']:,} tokens, {len(times['seconds']['prefill'])} rounds"
    return table([f"{head}, {times['threads']} thread{'s' * (times['threads'] > 1)}", "of prefill", "spread"], rows)
