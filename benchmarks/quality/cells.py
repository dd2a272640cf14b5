"""What the tables of the quality page share: which methods there are, which is best, numbers as text."""

from typing import Any

from benchmarks.quality.results import MEASURES, Comparison, Results, compare

__all__ = ["PEER", "beside", "best", "number", "peers", "present", "short", "shown", "value"]

PEER = "kvpress "  # the names of presses begin with it


def present(results: Results, names: Any, keep: float) -> list[str]:
    return [name for name in names if (name, keep) in results.runs]


def peers(results: Results, keep: float) -> list[str]:
    return [name for name in results.methods(keep) if name.startswith(PEER)]


def best(results: Results, names: list[str], keep: float, measure: str) -> str | None:
    """The name with the best value of a measure."""
    sign = 1 if MEASURES[measure].is_better_high else -1
    return max(names, key=lambda name: sign * value(results, name, keep, measure), default=None)


def value(results: Results, name: str, keep: float, measure: str) -> float:
    summary = results.summaries[name, keep]
    return {
        "accuracy": lambda: summary["needles"]["token_accuracy"],
        "exact": lambda: summary["needles"]["exact_by_context"],
        "nll": lambda: summary["needles"]["nll"],
        "perplexity": lambda: summary["perplexity"]["value"],
    }[measure]()["value"]


def beside(results: Results, first: str, second: str, keep: float, measure: str) -> Comparison:
    return compare(MEASURES[measure], results.runs[first, keep], results.runs[second, keep])


def short(peer: str) -> str:
    return peer.removeprefix(PEER)


def shown(name: str, ours: list[str]) -> str:
    return f"`{name}`" if name in ours else short(name)


def number(estimate: dict[str, Any]) -> str:
    return f"{estimate['value']:.3f}"
