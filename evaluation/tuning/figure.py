"""The figures of `kvcluster tune`: every KV head of a model, and which of them look far back."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.patches import Rectangle

from kvcluster.fast.huggingface.profiles import n_whole_by_default

from ..colours import BLACK, BLUE, GREY, ORANGE, VERMILION
from ..places import writing

__all__ = ["draw_losses", "draw_shares"]

MOST_LABELS = 400  # cells; more would be too small for a number
PERCENT_OF_WIDER = 10
CELL = 0.44  # inches


def draw_shares(
    path: Path, shares: Float[np.ndarray, "layers kv_heads"], layers: list[int], heads: list[tuple[int, int]], name: str
) -> None:
    """Save a heat map of the share of each head, the first 4 % and 10 % of `heads` outlined.

    Parameters
    ----------
    path : where the figure goes; its suffix says the format.
    shares : of each head, in [0, 1].
    layers : the index of each row of `shares` in the model.
    heads : (layer, KV head), the most wanting first.
    name : of the model.
    """
    n_layers, kv_heads = shares.shape
    size = (max(7.5, 1 + CELL * n_layers), 1.9 + CELL * kv_heads)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(shares.T, cmap="cividis", vmin=0, vmax=1)
    for column, head in np.ndindex(shares.shape if shares.size <= MOST_LABELS else (0, 0)):
        share = shares[column, head]
        label, colour = f"{share:.2f}".replace("0.", "."), "black" if share > 0.5 else "white"
        axis.text(column, head, label, ha="center", va="center", fontsize=6.5, color=colour)
    n_first, n_wider = n_whole_by_default(len(heads)), len(heads) * PERCENT_OF_WIDER // 100
    for place, (layer, head) in reversed(list(enumerate(heads[: max(n_first, n_wider)]))):
        colour, width = (VERMILION, 2.5) if place < n_first else (BLACK, 1.5)
        corner = layers.index(layer) - 0.46, head - 0.46
        axis.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=colour, linewidth=width))
    axis.set_xticks(range(n_layers), [str(layer) for layer in layers])
    axis.set_yticks(range(kv_heads))
    axis.set(xlabel="layer", ylabel="KV head")
    axis.set_title(f"{name}: which heads look far back?", parse_math=False)
    outlined = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=VERMILION, linewidth=2.5)]
    labels = [f"the first 4 %, at least one: {n_first} of {len(heads)} heads"]
    if n_wider > n_first:
        outlined.append(Rectangle((0, 0), 1, 1, fill=False, edgecolor=BLACK, linewidth=1.5))
        labels.append(f"up to 10 %: {n_wider}")
    figure.legend(outlined, labels, loc="outside lower center", ncols=2, frameon=False)
    bar = figure.colorbar(image, ax=axis, orientation="horizontal", location="top", aspect=60, shrink=0.8)
    bar.set_label("share of the text's tokens that the head looks back at when it repeats the text")
    with writing(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_losses(
    path: Path,
    losses: Float[np.ndarray, "heads parts"],
    parts: list[float],
    shares: Float[np.ndarray, "keeps heads"],
    keeps: list[float],
    heads: list[tuple[int, int]],
    name: str,
) -> None:
    """Save two panels: what each head loses when it alone keeps a part, and what shares follow from that.

    Parameters
    ----------
    path : where the figure goes; its suffix says the format.
    losses : nats, at each of `parts`.
    shares : of each head where `keeps` of all tokens are kept.
    heads : (layer, KV head), in the order of the rows of `losses`.
    name : of the model.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    colours = (VERMILION, BLUE, ORANGE, GREY, BLACK)
    for place, (layer, head) in enumerate(heads):
        style = {"color": colours[place % len(colours)], "marker": "o", "ls": ("-", "--")[place // len(colours) % 2]}
        left.plot([*parts, 1.0], [*losses[place], 0.0], label=f"layer {layer}, KV head {head}", **style)
        right.plot([0.0, *keeps, 1.0], [0.0, *shares[:, place], 1.0], **style)
    left.set(xlabel="part of its tokens that the head keeps", ylabel="loss (nats a token)", xscale="log")
    left.set_xticks([*parts, 1.0], [f"{part:g}" for part in [*parts, 1.0]])
    left.minorticks_off()
    left.set_title("What is lost when one head alone is compressed")
    right.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    right.text(0.42, 0.36, "all heads alike", color=GREY)
    right.set(xlabel="kept of all heads, on average", ylabel="share of each head")
    right.set_title("So the heads share what is kept")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.suptitle(f"{name}: which heads need their tokens?", parse_math=False)
    with writing(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)
