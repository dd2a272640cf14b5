"""The reference checks the fast path: every assignment, every stored bit, every attention output."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from transformers import AttentionInterface

from kvcluster import fast, reference
from kvcluster.fast.huggingface.attention import NAME, attend
from kvcluster.reference.agreement import attention_agreement

__all__ = ["NextTokenAttention", "Verdict", "check_against_reference", "next_token_attention"]


@dataclass(frozen=True, eq=False)
class NextTokenAttention:
    """Inputs and outputs of attention for the next token, one item per layer.

    Attributes
    ----------
    query_full : (kv_heads, group, dim), with the full cache.
    keys_full : (kv_heads, tokens + 1, dim), the full cache and the next token.
    query, output : (kv_heads, group, dim), with the clustered cache.
    new_keys, new_values : (kv_heads, 1, dim), of the next token, with the clustered cache.
    """

    query_full: list[np.ndarray]
    keys_full: list[np.ndarray]
    query: list[np.ndarray]
    output: list[np.ndarray]
    new_keys: list[np.ndarray]
    new_values: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Verdict:
    """The verdict in one line, whether the two agree, and the reference's labels (kv_heads, body tokens) by layer.

    Layers that attend to a sliding window are not among them.
    """

    line: str
    agrees: bool
    labels: dict[int, np.ndarray]


class Listen:
    """Records inputs and output of every attention that the model runs while it is active, and changes nothing."""

    def __init__(self) -> None:
        self.calls: list[list[torch.Tensor]] = []

    def __enter__(self) -> "Listen":
        AttentionInterface.register(NAME, self.attend)
        return self

    def __exit__(self, *_: object) -> None:
        AttentionInterface.register(NAME, attend)

    def attend(self, module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        result = attend(module, query, key, value, *args, **kwargs)
        self.calls.append([x.clone() for x in (query, key, value, result[0])])
        return result


def next_token_attention(model: Any, full: Any, clustered: Any, token: torch.Tensor) -> NextTokenAttention:
    """What happens in every attention layer when both caches take `token` (1, 1). The caches are left as they were."""
    heard = {}
    for name, cache in (("full", full), ("clustered", clustered)):
        with Listen() as listen:
            model(token, past_key_values=copy.deepcopy(cache))
        kv_heads = listen.calls[0][1].shape[1]
        heard[name] = [
            [x.reshape(kv_heads, -1, x.shape[-1]).numpy() for x in call] for call in listen.calls
        ]  # query, keys, values, output of each layer, (kv_heads, ..., dim)
    return NextTokenAttention(
        query_full=[call[0] for call in heard["full"]],
        keys_full=[call[1] for call in heard["full"]],
        query=[call[0] for call in heard["clustered"]],
        output=[call[3] for call in heard["clustered"]],
        new_keys=[call[1][:, -1:] for call in heard["clustered"]],
        new_values=[call[2][:, -1:] for call in heard["clustered"]],
    )


def check_against_reference(full: Any, clustered: Any, attention: NextTokenAttention, progress: Progress) -> Verdict:
    """Cluster every layer's keys again in NumPy and compare: assignments, stored bits, attention outputs."""
    compared = differing = differing_bytes = 0
    error, bound, within = 0.0, 0.0, True
    labels = {}
    own = [index for index, layer in enumerate(clustered.layers) if not layer.is_sliding]
    for index in progress.track(own, description="Check by the reference"):
        full_layer, clustered_layer = full.layers[index], clustered.layers[index]
        keys, values = full_layer.keys[0], full_layer.values[0]  # (kv_heads, tokens, dim)
        entries = clustered_layer.cache.caches[0]
        parameters = {"keep_ratio": entries.keep_ratio, "chunk_size": entries.chunk_size}
        cache = reference.ClusteredCache(**parameters, n_sink=entries.n_sink, n_recent=entries.n_recent)
        cache.append(keys.numpy(), values.numpy())

        body = keys[:, entries.n_sink : entries.n_sink + cache.n_clustered]  # whole chunks
        ours = fast.chunked_soft_matching(body, **parameters).labels.numpy()
        labels[index] = reference.chunked_soft_matching(body.numpy(), **parameters).labels
        compared += labels[index].size
        differing += int((ours != labels[index]).sum())
        for stored, expected in (
            (entries.keys, cache.keys),
            (entries.values, cache.values),
            (entries.counts, cache.counts),
        ):
            differing_bytes += int((stored[0].numpy().view(np.uint8) != expected.view(np.uint8)).sum())

        keys_now, values_now, counts_now = cache.append(attention.new_keys[index], attention.new_values[index])
        agreement = attention_agreement(
            attention.output[index], attention.query[index], keys_now, values_now, counts_now
        )
        within &= agreement.holds
        worst = (agreement.error / agreement.bound).argmax()
        if agreement.error[worst] / agreement.bound[worst] >= (error / bound if bound else 0):
            error, bound = float(agreement.error[worst]), float(agreement.bound[worst])

    agrees = within and differing == differing_bytes == 0
    heads, n_tokens = next(iter(labels.values())).shape
    line = (
        f"Reference: {len(labels)} layers x {heads} heads x {n_tokens:,} clustered tokens compared, "
        f"{differing} assignments and {differing_bytes} stored bytes differ; attention error at worst {error:.1e} "
        f"where {bound:.1e} is allowed. {'They agree.' if agrees else 'THEY DISAGREE.'}"
    )
    return Verdict(line, agrees, labels)
