"""The four figures of the pages: scaling, partition, gap, certificate. Needs matplotlib and SmolLM2."""

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvcluster.evaluation.places import writing
from kvcluster.reference import alternating_partition

from .complexity import closed_forms
from .merging.certified import KEEP_RATIOS, Trial, judge, random_trials, real_trials
from .merging.checks import log_sum_exp
from .partition.optimal import mean_best_of_real_keys

__all__ = ["draw_all"]

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#777777"  # Okabe and Ito: told apart by any eyes
DIM, CHUNK, N_SHOWN = 64, 64, 3000


def draw_all(folder: Path) -> Iterator[Path]:
    """Draw every figure into `folder`; yields each file when it is there."""
    figures: dict[str, Callable[[], Figure]] = {
        "scaling": draw_scaling,
        "partition": draw_partition,
        "gap": draw_gap,
        "certificate": draw_certificate,
    }
    for name, draw in figures.items():
        path = folder / f"{name}.png"
        figure = draw()
        with writing(path):
            figure.savefig(path, dpi=100)
        plt.close(figure)
        yield path


def draw_scaling() -> Figure:
    """Operations of clustering a prompt; and when decoding has saved them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    tokens = 2 ** np.arange(9, 18)
    whole = [closed_forms.matching_operations(n, DIM, keep_ratio=0.5, chunk_size=n).total for n in tokens.tolist()]
    chunked = [
        closed_forms.matching_operations(n, DIM, keep_ratio=0.5, chunk_size=CHUNK).total for n in tokens.tolist()
    ]
    kmeans = [
        closed_forms.kmeans_operations(n, DIM, n_clusters=-(-n // 80), assignments=10, updates=10).total
        for n in tokens.tolist()
    ]
    for costs, colour, marker, name in (
        (kmeans, GREEN, "^", "k-means, one cluster per 80 tokens, 10 rounds"),
        (whole, ORANGE, "s", "matching in one chunk of all tokens"),
        (chunked, BLUE, "o", f"matching in chunks of {CHUNK}"),
    ):
        left.plot(tokens, costs, color=colour, marker=marker, label=name)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(tokens, [f"{n:,}" if n < 1024 else f"{n // 1024}k" for n in tokens.tolist()])
    left.set_xlabel("tokens of the prompt")
    left.set_ylabel("operations per head (additions, products, ...)")
    left.set_title(
        "Cost of clustering the keys: twice the tokens cost twice\nthe operations in chunks, four times without"
    )
    left.legend(loc="upper left")
    left.grid(alpha=0.3)

    n_prompt, generated = 8192, np.arange(0, 41)
    entries = closed_forms.entries_after(n_prompt, 0.25, CHUNK)
    spent = closed_forms.compression_operations(n_prompt, DIM, DIM, keep_ratio=0.25, chunk_size=CHUNK).multiplications
    per_entry = 2 * DIM + 1
    for group, style in ((1, "-"), (4, "--")):
        heads = "1 query head" if group == 1 else f"{group} query heads"
        after = generated * (generated + 1) / 2  # entries of the generated tokens themselves
        full = group * per_entry * (generated * n_prompt + after)
        clustered = spent + group * per_entry * (generated * entries + after)
        right.plot(generated, full / 1e6, style, color=ORANGE, label=f"full cache, {heads} per KV head")
        right.plot(generated, clustered / 1e6, style, color=BLUE, label=f"clustering, then a quarter, {heads}")
        paid = closed_forms.break_even(n_prompt, DIM, group=group, keep_ratio=0.25, chunk_size=CHUNK)
        right.plot([paid], [full[paid] / 1e6], "o", color="black", markersize=8)
        right.annotate(
            f"paid back after {paid} tokens",
            (paid, full[paid] / 1e6),
            xytext=(17, 9) if group == 1 else (1, 45),
            arrowprops={"arrowstyle": "->"},
        )
    right.set_xlim(0, 40)
    right.set_ylim(0, 75)
    right.set_xlabel("tokens generated since the prompt")
    right.set_ylabel("millions of multiplications so far, per KV head")
    right.set_title(
        f"When clustering {n_prompt:,} tokens has paid for itself\n(by count; measured it is later, see claim C5)"
    )
    right.legend(loc="upper right", fontsize=9)
    right.grid(alpha=0.3)
    return figure


def draw_partition() -> Figure:
    """Three partitions of 16 tokens with the way of each source; how well they match SmolLM2's keys."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), width_ratios=[1.5, 1], layout="constrained")
    sources, _ = alternating_partition(16)
    rows = {
        "alternating\n(ours)": sources,
        "source, two\ndestinations,\nsource": np.array([0, 3, 4, 7, 8, 11, 12, 15]),
        "halves": np.arange(8),
    }
    for height, (name, sources) in zip((2, 1, 0), rows.items(), strict=True):
        draw_ways(left, height, sources)
        left.text(-1.0, height, name, ha="right", va="center", fontsize=11)
    left.plot([], [], "o", color=ORANGE, markersize=11, label="source: joins its most similar destination")
    left.plot([], [], "s", color=BLUE, markersize=11, label="destination")
    left.set_xlim(-4.2, 15.6)
    left.set_ylim(-0.6, 3.1)
    left.set_xticks(range(16))
    left.set_yticks([])
    left.set_xlabel("token of the chunk")
    left.set_title(
        "If similarity falls with distance, each source goes to the nearest destination (arcs).\n"
        "The first two partitions are optimal: every source has one next to it."
    )
    left.legend(loc="upper center", ncols=2, frameon=False)
    left.spines[["left", "right", "top"]].set_visible(False)

    means = {name: cosines.mean() for name, cosines in mean_best_of_real_keys().items()}
    names = {
        "alternating": "alternating (ours)",
        "abba": "source, two dest., source",
        "random": "random halves",
        "halves": "first half, second half",
        "anywhere": "any token of the chunk\n(no partition: upper bound)",
    }
    colours = [BLUE, BLUE, GREY, GREY, GREEN]
    values = [means[name] for name in names]
    bars = right.barh(list(names.values()), values, color=colours)
    right.bar_label(bars, [f"{value:.3f}" for value in values], padding=4)
    right.invert_yaxis()
    right.set_xlim(0.75, 0.92)
    right.set_xlabel("mean cosine of a source and its best match (axis starts at 0.75)")
    right.set_title("SmolLM2-135M's keys, all 90 heads,\nchunks of 64 tokens")
    right.spines[["right", "top"]].set_visible(False)
    return figure


def draw_ways(axis: Axes, height: float, sources: np.ndarray) -> None:
    """Sources and destinations on a line, and an arc from each source to its nearest destination."""
    destinations = np.setdiff1d(np.arange(16), sources)
    for source in sources:
        target = destinations[np.abs(destinations - source).argmin()]
        angle = np.linspace(0, np.pi, 30)
        radius, middle = abs(target - source) / 2, (source + target) / 2
        axis.plot(middle + radius * np.cos(angle), height + 0.17 + 0.07 * radius * np.sin(angle), color=GREY)
    axis.plot(sources, np.full(len(sources), height), "o", color=ORANGE, markersize=13)
    axis.plot(destinations, np.full(len(destinations), height), "s", color=BLUE, markersize=12)


def draw_gap() -> Figure:
    """What a centroid weighs less than its tokens, beside half of the variance of their logits, for real clusters."""
    halves, gaps = [], []
    for trial in real_trials(0.25):
        logits = trial.scale * np.einsum("hqd,htd->hqt", trial.query, trial.keys, dtype=np.float64)
        for problem, counts in enumerate(trial.clustering.counts):
            for label in np.flatnonzero(counts > 1)[::7]:
                members = logits[problem][:, trial.clustering.labels[problem] == label]
                halves.append(members.var(axis=-1) / 2)
                gaps.append(log_sum_exp(members) - np.log(members.shape[-1]) - members.mean(axis=-1))
    half, gap = np.concatenate(halves), np.concatenate(gaps)
    shown = np.random.default_rng(0).permutation(len(half))[:N_SHOWN]
    figure, axis = plt.subplots(figsize=(8.5, 6.2), layout="constrained")
    axis.plot(
        half[shown],
        gap[shown],
        "o",
        color=BLUE,
        markersize=3,
        alpha=0.4,
        label="a cluster and a query of SmolLM2, a quarter kept",
    )
    ends = np.array([1e-4, 1e2])
    axis.plot(ends, ends, color="black", label="gap = half of the variance (claim M3, second order)")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(1e-4, 1e2)
    axis.set_ylim(1e-4, 1e2)
    axis.set_xlabel("half of the variance of the logits inside the cluster (nats squared)")
    axis.set_ylabel("log of the weight that the centroid lacks (nats)")
    share = (gap > 1).mean()
    axis.set_title(
        "A centroid weighs less than its tokens: by half of their logits' variance, while that is small.\n"
        f"Of these clusters, {share:.0%} lose more than 1 nat (a factor of 2.7).",
        fontsize=11,
    )
    axis.legend(loc="upper left")
    axis.grid(alpha=0.3)
    return figure


def draw_certificate() -> Figure:
    """Certificate against true error, both over the longest value."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    real = {ratio: real_trials(ratio) for ratio in KEEP_RATIOS}
    names = {f"SmolLM2, {ratio:.0%} of the entries kept": trials for ratio, trials in real.items()}
    panels: tuple[dict[str, Iterator[Trial]], ...] = ({"random caches and queries": random_trials()}, names)
    for axis, panel in zip(axes, panels, strict=True):
        for (name, trials), colour, marker in zip(panel.items(), (BLUE, ORANGE, GREEN), "o^s", strict=False):
            error, bound = relative(trials)
            shown = np.random.default_rng(0).permutation(len(error))[: N_SHOWN // len(panel)]
            is_measurable = error > 1e-12  # less is rounding
            times = np.median(bound[is_measurable] / error[is_measurable])
            label = f"{name}: median {times:.3g} times the error"
            axis.plot(error[shown], bound[shown], marker, color=colour, markersize=3, alpha=0.5, label=label)
        ends = np.array([1e-7, 10])
        axis.plot(ends, ends, color="black")
        axis.fill_between(ends, 1e-7, ends, color=GREY, alpha=0.25)
        axis.text(1e-1, 1e-5, "impossible if the\ncertificate is right", ha="center", fontsize=11)
        axis.axhline(1, color=GREY, linestyle="--")
        axis.text(1.3e-7, 2.2, "above the dashed line a bound says nothing", fontsize=10, va="bottom")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(1e-7, 10)
        axis.set_ylim(1e-7, 100)
        axis.set_xlabel("true error of the attention output / longest value")
        axis.legend(loc="upper left", markerscale=2.5)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error that the certificate allows / longest value")
    axes[0].set_title("Random data: half of the queries point where the clusters are widest")
    axes[1].set_title("SmolLM2, all layers, 512 tokens: useful for gentle merging only")
    return figure


def relative(trials: Iterator[Trial]) -> tuple[np.ndarray, np.ndarray]:
    """True errors and certificates of all trials, over the length of the longest value of each cache."""
    errors, bounds = [], []
    for trial in trials:
        verdict = judge(trial)
        longest = np.linalg.norm(trial.values, axis=-1).max(axis=-1)[..., None]
        errors.append((verdict.error / longest).ravel())
        bounds.append((verdict.bound / longest).ravel())
    return np.concatenate(errors), np.concatenate(bounds)
