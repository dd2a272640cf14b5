"""Tokens per second against the size of the pool, drawn."""

import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.vllm.pools import N_PROMPT, PAGE
from kvcluster.evaluation.colours import BLUE, SKY, VERMILION

__all__ = ["draw_pools"]

COLOURS = {"stock": VERMILION, "keep 0.5": SKY, "keep 0.25": BLUE}


def draw_pools(path, all_lines):
    """Both rates against the pool, with the number of requests at once beside each point."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    titles = {"decode": "steps that only generate", "whole": "the whole run, prompts read too"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for contender, colour in COLOURS.items():
            lines = [line for line in all_lines if line["contender"] == contender and line["n_new"] == 256]
            lines.sort(key=lambda line: line["blocks"])
            blocks = [line["blocks"] for line in lines]
            rates = [[run[name] for run in line["runs"]] for line in lines]
            middle = [statistics.median(rates_of_line) for rates_of_line in rates]
            low = [m - min(rates_of_line) for m, rates_of_line in zip(middle, rates, strict=True)]
            high = [max(rates_of_line) - m for m, rates_of_line in zip(middle, rates, strict=True)]
            axis.errorbar(blocks, middle, (low, high), fmt="o-", color=colour, capsize=3, label=contender)
            for line, x, y in zip(lines, blocks, middle, strict=True):
                label = f"{min(run['at_once'] for run in line['runs'])} at once"
                axis.annotate(label, (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axis.set(xlabel=f"blocks of the pool, {PAGE} tokens each", ylabel="generated tokens per second", title=title)
        axis.set_xticks(blocks)
        axis.margins(x=0.12)
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    axes[0].legend()
    figure.suptitle(
        f"vLLM on this CPU, prompts of {N_PROMPT:,} tokens, 256 generated: the same pool serves more at once"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
