"""The page of quality, every sentence of which is made from the numbers: whatever they are, it is true of them."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.cells import best, number, peers, present, table, value, with_interval
from benchmarks.quality.results import Results
from benchmarks.quality.verdicts import (
    beside_section,
    cost_ratios,
    fails_section,
    frontier_section,
    target_section,
    wins_section,
)

__all__ = ["Page", "make_page"]


@dataclass(frozen=True)
class Page:
    """What the page says beside the numbers.

    Attributes
    ----------
    ours : names of our methods in their order, with what they are; those with targets are all but "chunked".
    setting : sentences on model, text, needles, versions and machine.
    commands : lines of a shell that make the page again.
    times : of `time_compression`, or None.
    presses : how each press was made, by name.
    left_out : presses that were not run, with the reason.
    """

    ours: dict[str, str]
    setting: list[str]
    commands: list[str] = field(default_factory=list)
    times: dict[str, Any] | None = None
    presses: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def new(self) -> list[str]:
        return [name for name in self.ours if name != "chunked"]


def make_page(results: Results, page: Page) -> str:
    """The page as Markdown."""
    parts = [
        "# Quality: what is left of a context when the question comes later",
        "Made by `make quality` from measured runs; not written by hand.",
        setting_section(results, page),
        beside_section(results, list(page.ours)),
        *(table_section(results, page, keep) for keep in results.keeps),
        frontier_section(results, list(page.ours)),
        "## By depth\n\n![token accuracy by depth](../../docs/figures/quality-depths.png)",
        kind_section(results, page),
        target_section(results, page.new, page.times),
        wins_section(results, list(page.ours)),
        fails_section(results, list(page.ours)),
        cost_section(page),
        how_section(page),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def setting_section(results: Results, page: Page) -> str:
    full = results.summaries["full", 1.0]
    n, contexts = full["needles"]["n"], full["n_contexts"]
    n_tokens = sorted({run["n_tokens"] for run in results.full})
    lines = [
        f"{contexts} contexts of {' and '.join(f'{x:,}' for x in n_tokens)} tokens with {n} needles in all. "
        f"The full cache's needle token accuracy is {with_interval(full['needles']['token_accuracy'])}, exact needles "
        f"{with_interval(full['needles']['exact_by_context'])}, {number(full['needles']['nll'])} nats a needle token, "
        f"perplexity {number(full['perplexity']['value'])} of {full['perplexity']['n_tokens']:,} tokens that follow.",
        *page.setting,
        "Every cache was compressed before anything was asked, and every question was answered from a copy of it. "
        "Kept is what is stored in each layer and KV head over the tokens of the context, sinks and recent tokens "
        "included; of methods that give layers different numbers of entries, the mean of the layers.",
        "In brackets: 95 % intervals from resampling whole contexts, since needles of one context are not "
        f"independent; {contexts} contexts are few, and the intervals with them rough.",
    ]
    if results.unfinished:
        names = ", ".join(f"{name} {keep:g}" for name, keep in results.unfinished)
        lines.append(f"Left out, since they did not run on all contexts: {names}.")
    missing = [name for name in page.ours if not any(name == found for found, _ in results.runs)]
    if missing:
        lines.append(f"Not measured: {', '.join(missing)}.")
    return "## What was measured\n\n" + "\n\n".join(lines)


def table_section(results: Results, page: Page, keep: float) -> str:
    names = ["full", *present(results, page.ours, keep)]
    ordered = sorted(peers(results, keep), key=lambda name: -value(results, name, keep, "accuracy"))
    rows = []
    for name in [*names, *ordered]:
        pair = (name, 1.0 if name == "full" else keep)
        each, runs = results.summaries[pair], results.runs[pair]
        needles, perplexity = each["needles"], each["perplexity"]
        stored = [n for run in runs for n in run["n_stored"]]
        entries = f"{statistics.fmean(stored):,.0f}"
        if min(stored) < max(stored):
            entries += f" ({min(stored):,} to {max(stored):,})"
        rows.append(
            [
                f"`{name}`" if name in ("full", *page.ours) else name,
                with_interval(needles["of_full"]),
                with_interval(needles["token_accuracy"]),
                with_interval(needles["exact_by_context"]),
                with_interval(needles["nll"]),
                with_interval(perplexity["of_full"]),
                entries,
                f"{each['bytes']:.3f}",
            ]
        )
    head = ["method", "needle accuracy / full", "token accuracy", "exact", "nats", "perplexity / full"]
    head += ["entries a layer and head", "bytes / full"]
    return f"## Keep {keep:g}\n\n{table(head, rows)}"


def kind_section(results: Results, page: Page) -> str:
    rows = []
    for keep in results.keeps:
        peer = best(results, peers(results, keep), keep, "accuracy")
        for name in [*present(results, page.ours, keep), *([peer] if peer else [])]:
            kinds = results.summaries[name, keep]["needles"]["by_kind"]
            cells = [f"{kinds[kind]['token_accuracy']:.3f} / {kinds[kind]['exact']:.2f}" for kind in sorted(kinds)]
            rows.append([f"{keep:g}", f"`{name}`" if name in page.ours else name, *cells])
    full = results.summaries["full", 1.0]["needles"]["by_kind"]
    cells = [f"{full[kind]['token_accuracy']:.3f} / {full[kind]['exact']:.2f}" for kind in sorted(full)]
    head = ["kept", "method", *(f"{kind} ({full[kind]['n']})" for kind in sorted(full))]
    text = "Token accuracy / exact needles, ours and the best press at token accuracy; in brackets the needles."
    return f"## By kind\n\n{text}\n\n{table(head, [['all', '`full`', *cells], *rows])}"


def cost_section(page: Page) -> str:
    if page.times is None:
        return ""
    rows = []
    for label, ratios in cost_ratios(page.times).items():
        spread = f"{100 * min(ratios):.1f} to {100 * max(ratios):.1f} %"
        name = "storing without compressing" if label == "full" else f"`{label}`"
        rows.append([name, f"{100 * statistics.median(ratios):.1f} %", spread])
    n = len(page.times["seconds"]["prefill"])
    text = (
        f"Time in which a cache takes {page.times['tokens']:,} tokens of keys and values of all layers, over the time "
        f"of their prefill; {n} rounds in turns in one process, {page.times['threads']} thread"
        f"{'s' * (page.times['threads'] > 1)}; median, and from the least to the most."
    )
    return f"## Cost of compression\n\n{text}\n\n{table(['method and share kept', 'of prefill', 'spread'], rows)}"


def how_section(page: Page) -> str:
    lines = ["## How"]
    if page.commands:
        lines.append("```\n" + "\n".join(page.commands) + "\n```")
    lines.append("\n".join(f"- `{name}`: {note}." for name, note in page.ours.items()))
    if page.presses:
        lines.append(
            "kvpress's presses have its defaults but for what is named here; its `compression_ratio` is the fraction "
            "removed, 1 - kept, and none sees a question (some, as SnapKV and TOVA, judge by the last tokens of the "
            "context):"
        )
        lines.append("\n".join(f"- {name}: `{made}`" for name, made in page.presses.items()))
    if page.left_out:
        lines.append("Not run:\n\n" + "\n".join(f"- {name}: {reason}." for name, reason in page.left_out.items()))
    return "\n\n".join(lines)
