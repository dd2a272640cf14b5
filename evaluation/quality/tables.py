"""Summaries as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ..report import with_interval
from . import METHODS

__all__ = ["print_summaries"]


def print_summaries(console: Console, summaries: list[dict[str, Any]]) -> None:
    """One line a method and share kept; then the same for tasks, if there were any."""
    console.print(main_table(summaries))
    tasks = list(dict.fromkeys(task for each in summaries for task in each.get("tasks", {})))
    if tasks:
        console.print(task_table(summaries, tasks))


def main_table(summaries: list[dict[str, Any]]) -> Table:
    caption = (
        "In brackets: 95 % intervals, by resampling contexts (those of exact needles: Wilson's). Entries: stored / "
        "tokens, mean of layers, sinks and recent tokens included; methods without * are held to the share kept."
    )
    table = Table(title="Quality, asked after the cache was built", caption=caption, caption_justify="left")
    columns = ("method", "kept", "entries", "bytes / full", "needles", "token accuracy", "/ full", "exact", "nats")
    for column in (*columns, "perplexity", "/ full", "attention error", "clustering", "asking"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for each in summaries:
        needles, perplexity = each.get("needles", {}), each.get("perplexity", {})
        errors = each.get("attention_errors")
        method = METHODS[each["method"]]
        table.add_row(
            each["method"] + "*" * method.stores_all,
            f"{each['keep']:g}" if method.has_keep else "all",
            f"{each['entries']:.3f}",
            shown(each["bytes"]),
            str(needles.get("n", "")),
            with_interval(needles.get("token_accuracy"), to="-"),
            shown(needles.get("of_full", {}).get("value")),
            with_interval(needles.get("exact"), to="-"),
            shown(needles.get("nll", {}).get("value")),
            shown(perplexity.get("value", {}).get("value")),
            with_interval(perplexity.get("of_full"), to="-"),
            shown(None if errors is None else sum(errors) / len(errors)),
            f"{each['seconds']['clustering']:.2f} s",
            f"{each['seconds']['asking']:.0f} s",
        )
    return table


def task_table(summaries: list[dict[str, Any]], tasks: list[str]) -> Table:
    table = Table(title="Tasks answered by generation, mean score from 0 to 1", caption_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("n", justify="right")
    for each in summaries:
        kept = f" {each['keep']:g}" if METHODS[each["method"]].has_keep else ""
        table.add_column(each["method"] + kept, justify="right")
    for task in tasks:
        found = [each.get("tasks", {}).get(task) for each in summaries]
        first = next(each for each in found if each is not None)
        cells = [with_interval(each and each["score"], to="-") for each in found]
        table.add_row(task, first["metric"], str(first["n"]), *cells)
    return table


def shown(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"
