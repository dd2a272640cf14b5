"""Summaries as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ..report import with_interval
from . import METHODS

__all__ = ["print_summaries"]

SETTINGS = {
    False: "question later: asked after the cache was compressed",
    True: "question first: in the prompt, compressed after it",
}


def print_summaries(console: Console, summaries: list[dict[str, Any]]) -> None:
    """For each setting one line per method and share kept; then a table of tasks, if there are any."""
    for is_question_first, setting in SETTINGS.items():
        of_setting = [summary for summary in summaries if summary["is_question_first"] == is_question_first]
        if of_setting:
            console.print(main_table(of_setting, setting))
        tasks = list(dict.fromkeys(task for summary in of_setting for task in summary.get("tasks", {})))
        if tasks:
            console.print(task_table(of_setting, tasks, setting))


def main_table(summaries: list[dict[str, Any]], setting: str) -> Table:
    caption = (
        "In brackets: 95 % intervals, by resampling contexts (those of exact needles: Wilson's). Entries: stored / "
        "tokens, mean of layers, sinks and recent tokens included; methods without * are held to the share kept. Bytes "
        "over bfloat16: of layers that attend to everything, what is not quantized counted in bfloat16."
    )
    table = Table(title=f"Quality, {setting}", caption=caption, caption_justify="left")
    columns = (
        "method",
        "kept",
        "entries",
        "bytes / full",
        "/ bfloat16",
        "needles",
        "token accuracy",
        "/ full",
        "exact",
    )
    for column in (*columns, "nats", "perplexity", "/ full", "attention error", "clustering", "asking"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for summary in summaries:
        needles, perplexity = summary.get("needles", {}), summary.get("perplexity", {})
        errors = summary.get("attention_errors")
        method = METHODS[summary["method"]]
        table.add_row(
            summary["method"] + "*" * method.stores_all,
            f"{summary['keep']:g}" if method.has_keep else "all",
            f"{summary['entries']:.3f}",
            shown(summary["bytes"]),
            shown(summary["of_bfloat16"]),
            str(needles.get("n", "")),
            with_interval(needles.get("token_accuracy"), to="-"),
            shown(needles.get("of_full", {}).get("value")),
            with_interval(needles.get("exact"), to="-"),
            shown(needles.get("nll", {}).get("value")),
            shown(perplexity.get("value", {}).get("value")),
            with_interval(perplexity.get("of_full"), to="-"),
            shown(None if errors is None else sum(errors) / len(errors)),
            f"{summary['seconds']['clustering']:.2f} s",
            f"{summary['seconds']['asking']:.0f} s",
        )
    return table


def task_table(summaries: list[dict[str, Any]], tasks: list[str], setting: str) -> Table:
    title = f"Tasks answered by generation, mean score from 0 to 1, {setting}"
    table = Table(title=title, caption_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("n", justify="right")
    for summary in summaries:
        share = f" {summary['keep']:g}" if METHODS[summary["method"]].has_keep else ""
        table.add_column(summary["method"] + share, justify="right")
    for task in tasks:
        results = [summary.get("tasks", {}).get(task) for summary in summaries]
        first = next(summary for summary in results if summary is not None)
        cells = [with_interval(summary and summary["score"], to="-") for summary in results]
        table.add_row(task, first["metric"], str(first["n"]), *cells)
    return table


def shown(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"
