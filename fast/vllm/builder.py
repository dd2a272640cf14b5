"""The plan of each step, and what vLLM's kernel and ours want to know of it: worked out once for all layers."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

from .rule import PageRule
from .steps import plan_step

__all__ = ["ClusteredBuilder", "ClusteredMetadata"]


@dataclass
class Run:
    """Neighbouring requests of a step that have no clusters yet: vLLM's kernel attends for them.

    Attributes
    ----------
    tokens : theirs, in the batch.
    known : what the kernel wants to know.
    slots : where their keys and values are written in memory of the worker's own, which is then attended to and
        clustered from; None if they lie in vLLM's pages.
    """

    tokens: slice
    known: CPUAttentionMetadata
    slots: Tensor | None


@dataclass
class ClusteredMetadata:
    """A step: requests without clusters in runs, for vLLM's kernel, the others for ours.

    Attributes
    ----------
    rule : the rule.
    runs : of requests without clusters.
    tokens : tokens of the batch whose requests have clusters, (n,), int64.
    tables, requests : as in `attend_pages`.
    due, due_of_own : chunks of vLLM's pages, and of the worker's own: `Due.tensors`.
    own : the worker's own pages, used by one layer after the other.
    """

    rule: PageRule
    runs: list[Run]
    tokens: Tensor
    tables: Tensor
    requests: Tensor
    due: tuple[Tensor, Tensor] | None
    due_of_own: tuple[Tensor, Tensor] | None
    own: Tensor


class ClusteredBuilder(CPUAttentionMetadataBuilder):
    """Makes the metadata of every step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rule: PageRule = kv_cache_spec.rule
        content = kv_cache_spec.state_content_size_bytes // kv_cache_spec.dtype.itemsize
        self.own = torch.zeros(0, kv_cache_spec.num_kv_heads, self.rule.page, content, dtype=kv_cache_spec.dtype)
        if self.isa not in ("vec", "vec16"):  # AMX lays keys out in another way
            self.isa: str = "vec"
            self._set_isa_to_layers(layer_names)
        # The runner tells backends how long the prompts are only for models with this attribute; nothing else in
        # the CPU worker reads it.
        object.__setattr__(vllm_config.model_config.model_arch_config, "rswa_window", 1)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> ClusteredMetadata:
        common = common_attn_metadata
        if common.rswa_prefix_lens is None:
            raise RuntimeError("kvcluster: the runner must tell the lengths of prompts: another version of vLLM?")
        n = common.num_reqs
        plan = plan_step(
            self.rule,
            common.query_start_loc_cpu[: n + 1].numpy(),
            common.seq_lens[:n].numpy(),
            common.rswa_prefix_lens[:n].numpy(),
            common.block_table_tensor[:n].numpy(),
        )
        if plan.n_own > len(self.own):
            self.own = self.own.new_zeros(plan.n_own, *self.own.shape[1:])
        runs = [self.run_of(common, rows, None) for rows in neighbours(plan.paged)]
        runs += [self.run_of(common, rows, torch.from_numpy(plan.own_table)) for rows in neighbours(plan.own)]
        tokens = [torch.arange(first, first + n_new) for first, n_new, *_ in plan.requests]
        return ClusteredMetadata(
            rule=self.rule,
            runs=runs,
            tokens=torch.cat([torch.empty(0, dtype=torch.int64), *tokens]),
            tables=side_by_side(plan.tables),
            requests=torch.tensor(plan.requests, dtype=torch.int64).reshape(-1, 5),
            due=plan.due.tensors(),
            due_of_own=plan.due_of_own.tensors(),
            own=self.own,
        )

    def run_of(self, common: CommonAttentionMetadata, rows: range, own_table: Tensor | None) -> Run:
        """A run of the requests `rows`, which lie in the worker's own pages if a table of these is given."""
        requests = slice(rows.start, rows.stop)
        starts = common.query_start_loc[rows.start : rows.stop + 1]
        tokens, slots = slice(int(starts[0]), int(starts[-1])), None
        table = common.block_table_tensor if own_table is None else own_table
        if own_table is not None:
            lengths = common.seq_lens[requests].tolist()
            slots = torch.cat([self.slots_of(own_table[row], n) for row, n in zip(rows, lengths, strict=True)])
        part = common.replace(
            num_reqs=len(rows),
            num_actual_tokens=tokens.stop - tokens.start,
            query_start_loc=starts - starts[0],
            seq_lens=common.seq_lens[requests],
            max_query_len=int(starts.diff().max()),
            max_seq_len=int(common.seq_lens[requests].max()),
            block_table_tensor=table[requests],
            slot_mapping=common.slot_mapping[tokens] if slots is None else slots,
        )
        return Run(tokens, super().build(0, part), slots)

    def slots_of(self, blocks: Tensor, n_tokens: int) -> Tensor:
        """Places of the first `n_tokens` tokens in the pages `blocks`, as vLLM numbers them."""
        places = torch.arange(n_tokens)
        return blocks.long()[places // self.rule.page] * self.rule.page + places % self.rule.page


def side_by_side(tables: list[np.ndarray]) -> Tensor:
    """Rows of different lengths as one int32 tensor, filled up with 0."""
    table = np.zeros((len(tables), max(map(len, tables), default=0)), dtype=np.int32)
    for row, blocks in enumerate(tables):
        table[row, : len(blocks)] = blocks
    return torch.from_numpy(table)


def neighbours(rows: list[int]) -> list[range]:
    """Runs of consecutive numbers of an ascending list."""
    breaks = [at for at in range(1, len(rows)) if rows[at] != rows[at - 1] + 1]
    edges = [0, *breaks, len(rows)] if rows else []
    return [range(rows[a], rows[b - 1] + 1) for a, b in itertools.pairwise(edges)]
