"""The recall benchmark's figures."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.recall.settings import BUDGETS, FULL, OURS, PAGES, PAPER, TOP
from benchmarks.recall.tables import Result
from kvcluster.evaluation.colours import BLACK, BLUE, DARK_GREY, GREEN, GREY, SKY, VERMILION
from kvcluster.evaluation.quality.figures import bar_lengths, save

__all__ = ["draw_attention", "draw_needles", "draw_options"]

LOOKS = {
    TOP: {"color": GREY, "marker": "^", "linestyle": "--"},
    OURS: {"color": BLUE, "marker": "o", "linewidth": 2.5},
    PAPER: {"color": GREEN, "marker": "s"},
    PAGES: {"color": VERMILION, "marker": "D"},
}
Results = dict[tuple[str, int], Result]


def draw_needles(path: Path, results: Results) -> None:
    """Accuracy and negative log-likelihood against the budget."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    full = results[FULL, 0]
    draw_curves(axes[0], results, lambda r: r.accuracy["value"], lambda r: bar_lengths(r.accuracy))
    axes[0].axhline(full.accuracy["value"], color=BLACK, linestyle=":", label=FULL)
    axes[0].axhline(0.95 * full.accuracy["value"], color=BLACK, linestyle=":", alpha=0.4, label="95 % of it")
    axes[0].set(ylim=(0, 1.02), ylabel="token accuracy", title="Digits of the needle that are right")
    draw_curves(axes[1], results, lambda r: r.nll, None)
    axes[1].axhline(full.nll, color=BLACK, linestyle=":", label=FULL)
    axes[1].set(ylim=(0, None), ylabel="nats per token", title="Negative log-likelihood of the needle")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(
        f"SmolLM2-135M, {full.n_needles} needles, asked for after the cache was built; bars: 95 % intervals"
    )
    save(figure, path)


def draw_attention(path: Path, results: Results) -> None:
    """Recall rate, share of mass and output error against the budget."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    shown = {
        "recall_rate": ("share", "Recall rate of the true top 64 tokens"),
        "mass": ("share", "Share of the attention mass"),
        "error": ("relative length of the difference", "Error of the output"),
    }
    for ax, (name, (unit, title)) in zip(axes, shown.items(), strict=True):
        draw_curves(ax, results, lambda r, name=name: r.attention[name], None)
        ax.set(ylabel=unit, title=title, ylim=(0, 1.02 if name != "error" else None))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Attention while the needles are answered, mean over layers from the third on, heads and tokens")
    save(figure, path)


def draw_curves(ax: Axes, results: Results, of: object, lengths: object | None) -> None:
    """One line per method, `of(result)` against the budget, with bars of the `lengths` below and above it."""
    for name, look in LOOKS.items():
        budgets = [budget for budget in BUDGETS if (name, budget) in results]
        chosen = [results[name, budget] for budget in budgets]
        heights = np.array([of(result) for result in chosen])
        if not budgets:
            continue
        errors = None if lengths is None else np.array([lengths(result) for result in chosen]).T
        ax.errorbar(budgets, heights, yerr=errors, label=name, capsize=3, **look)
    ax.set_xscale("log", base=2)
    ax.set_xticks(BUDGETS, [f"{budget:,}" for budget in BUDGETS])
    ax.set_xlabel("budget (entries per KV head)")
    ax.grid(alpha=0.3)


def draw_options(path: Path, results: Results) -> None:
    """Accuracy of each option beside what it varies, one panel for the paper's settings and one for ours."""
    panels = {
        "One option on top of the paper's settings, budget 512": ("paper", 512, PAPER),
        "One change of ours, budget 128": ("ours", 128, OURS),
    }
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for ax, (title, (prefix, budget, base)) in zip(axes, panels.items(), strict=True):
        names = [name for name, size in results if size == budget and name.startswith(prefix) and name != base]
        shown = [base, *names] if (base, budget) in results else names
        chosen = [results[name, budget] for name in shown]
        heights = [result.accuracy["value"] for result in chosen]
        errors = np.array([bar_lengths(result.accuracy) for result in chosen]).reshape(-1, 2).T
        colors = [LOOKS[base]["color"], *[SKY] * len(names)][: len(shown)]
        ax.barh(shown, heights, xerr=errors, color=colors, error_kw={"ecolor": DARK_GREY, "capsize": 2})
        ax.axvline(results[FULL, 0].accuracy["value"], color=BLACK, linestyle=":")
        ax.invert_yaxis()
        ax.set(xlim=(0, 1.02), xlabel="token accuracy", title=title)
    figure.suptitle("Options; bars: 95 % intervals; dotted: the full cache")
    save(figure, path)
