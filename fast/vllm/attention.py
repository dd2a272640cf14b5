"""Attention of one layer to pages, and the clustering that follows it."""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from ..cpu.paged import attend_pages
from .builder import ClusteredMetadata
from .pages import cells_of, cluster_chunks, without_counts
from .settings import check_layer

__all__ = ["ClusteredAttention"]


class ClusteredAttention(CPUAttentionBackendImpl):
    """vLLM's attention for requests without clusters, `attend_pages` for the others; then what is due is clustered."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        check_layer(
            head_size=head_size,
            sliding_window=sliding_window,
            alibi_slopes=alibi_slopes,
            logits_soft_cap=logits_soft_cap,
            sinks=sinks,
            attn_type=attn_type,
            kv_sharing_target=kv_sharing_target_layer_name,
        )
        super().__init__(num_heads, head_size, scale, num_kv_heads, None, None, kv_cache_dtype)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: ClusteredMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """`output` (tokens, heads, dim), filled for the step's tokens, whose keys and values lie in the pages."""
        if attn_metadata is None:  # warming up
            return output
        step, cells, page = attn_metadata, cells_of(kv_cache), kv_cache.shape[2]
        for run in step.runs:
            pages = without_counts(kv_cache if run.slots is None else step.own, self.head_size)
            parts = [x[run.tokens] for x in (query, key, value)]
            if run.slots is not None:
                super().do_kv_cache_update(layer, *parts[1:], pages, run.slots)
            super().forward(layer, *parts, pages, run.known, output[run.tokens], output_scale, output_block_scale)
        if len(step.requests):
            outputs = attend_pages(query, cells, step.tables, step.requests, page=page, scale=self.scale)
            output[step.tokens] = outputs[step.tokens].to(output.dtype)
        for source, due in ((cells, step.due), (cells_of(step.own), step.due_of_own)):
            if due is not None:
                blocks, to = due
                cluster_chunks(source, blocks, cells, to, step.rule, self.head_size)
        return output

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        super().do_kv_cache_update(layer, key, value, without_counts(kv_cache, self.head_size), slot_mapping)
