"""The worker's side: what each step does with each request, worked out once for all layers."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from .rule import PageRule
from .settings import check_engine, settings_of
from .spec import ClusteredSpec

__all__ = ["ClusteredBackend", "ClusteredBuilder", "ClusteredMetadata", "register_backend_class"]


class ClusteredBackend(CPUAttentionBackend):
    """vLLM's CPU backend where nothing is asked of the plugin; else its layout, with clustered pages."""

    config: ClassVar[VllmConfig | None] = None  # of the model that was loaded last, if it asked for the plugin

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The first thing that a model asks when it is built, with the engine's options at hand."""
        config = get_current_vllm_config()
        settings = settings_of(config)
        ClusteredBackend.config = None if settings is None else config
        if settings is None:
            return CPUAttentionBackendImpl
        check_engine(config)
        settings.rule(config.cache_config.block_size)
        from .attention import ClusteredAttention

        return ClusteredAttention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CPUAttentionMetadataBuilder if ClusteredBackend.config is None else ClusteredBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        settings = settings_of(cls.config)
        if cls.config is None or settings is None:
            return spec
        return ClusteredSpec.of(spec, settings.rule(spec.block_size), most_at_once(cls.config.scheduler_config))


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
class Due:
    """Chunks that are clustered after a step's attention: `blocks` (chunks, pages) that hold their tokens, and `to`
    (chunks, pages) that will hold their entries, both int64."""

    blocks: Tensor
    to: Tensor


@dataclass
class ClusteredMetadata:
    """A step: requests without clusters in runs, for vLLM's kernel, the others for ours.

    Attributes
    ----------
    rule : the rule.
    runs : of requests without clusters.
    tokens : tokens of the batch whose requests have clusters, (n,), int64.
    tables, requests : as in `attend_pages`.
    due, due_of_own : chunks of vLLM's pages, and of the worker's own.
    own : the worker's own pages, used by one layer after the other.
    """

    rule: PageRule
    runs: list[Run]
    tokens: Tensor
    tables: Tensor
    requests: Tensor
    due: Due
    due_of_own: Due
    own: Tensor


class ClusteredBuilder(CPUAttentionMetadataBuilder):
    """Evaluates the rule for every request of a step."""

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
        common, rule = common_attn_metadata, self.rule
        if common.rswa_prefix_lens is None:
            raise RuntimeError("kvcluster: the runner must tell the lengths of prompts: another version of vLLM?")
        starts, prompts = common.query_start_loc_cpu.numpy(), common.rswa_prefix_lens.numpy()
        own_table = common.block_table_tensor.clone()
        n_own, n_to = 0, rule.entries // rule.page
        paged, own, requests, tables, due, due_of_own = [], [], [], [], [], []
        for row, n_tokens in enumerate(common.seq_lens.tolist()[: common.num_reqs]):
            n_new = int(starts[row + 1] - starts[row])
            before = rule.n_chunks(n_tokens - n_new, int(prompts[row]))
            after = rule.n_chunks(n_tokens, int(prompts[row]))
            blocks = common.block_table_tensor[row].numpy()
            places = [list(rule.pages_of(chunk)) for chunk in range(before, after)]
            if before:
                counted = rule.n_sink // rule.page
                requests.append(
                    (int(starts[row]), n_new, rule.n_stored(n_tokens, before), counted, counted + before * n_to)
                )
                tables.append(blocks[rule.kept_pages(n_tokens, before)])
            elif after and n_new == n_tokens:  # a prompt in one step: the scheduler gave no blocks for its holes
                own.append(row)
                n_pages = -(-n_tokens // rule.page)
                own_table[row, :n_pages] = torch.arange(n_own, n_own + n_pages)
                due_of_own += [(own_table[row].numpy()[of_chunk], blocks[of_chunk[:n_to]]) for of_chunk in places]
                n_own += n_pages
                continue
            else:
                paged.append(row)
            due += [(blocks[of_chunk], blocks[of_chunk[:n_to]]) for of_chunk in places]
        if n_own > len(self.own):
            self.own = self.own.new_zeros(n_own, *self.own.shape[1:])
        runs = [self.run_of(common, run, None) for run in neighbours(paged)]
        runs += [self.run_of(common, run, own_table) for run in neighbours(own)]
        tokens = [np.arange(first, first + n_new) for first, n_new, *_ in requests]
        return ClusteredMetadata(
            rule=rule,
            runs=runs,
            tokens=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *tokens])),
            tables=side_by_side(tables),
            requests=torch.tensor(requests, dtype=torch.int64).reshape(-1, 5),
            due=self.due_of(due),
            due_of_own=self.due_of(due_of_own),
            own=self.own,
        )

    def run_of(self, common: CommonAttentionMetadata, rows: range, own_table: Tensor | None) -> Run:
        """A run of the requests `rows`, which lie in the worker's own pages if a table of these is given."""
        of_rows = slice(rows.start, rows.stop)
        starts = common.query_start_loc[rows.start : rows.stop + 1]
        tokens, slots = slice(int(starts[0]), int(starts[-1])), None
        table = common.block_table_tensor if own_table is None else own_table
        if own_table is not None:
            lengths = common.seq_lens[of_rows].tolist()
            slots = torch.cat([self.slots_of(own_table[row], n) for row, n in zip(rows, lengths, strict=True)])
        part = common.replace(
            num_reqs=len(rows),
            num_actual_tokens=tokens.stop - tokens.start,
            query_start_loc=starts - starts[0],
            seq_lens=common.seq_lens[of_rows],
            max_query_len=int(starts.diff().max()),
            max_seq_len=int(common.seq_lens[of_rows].max()),
            block_table_tensor=table[of_rows],
            slot_mapping=common.slot_mapping[tokens] if slots is None else slots,
        )
        return Run(tokens, super().build(0, part), slots)

    def slots_of(self, blocks: Tensor, n_tokens: int) -> Tensor:
        """Places of the first `n_tokens` tokens in the pages `blocks`, as vLLM numbers them."""
        places = torch.arange(n_tokens)
        return blocks.long()[places // self.rule.page] * self.rule.page + places % self.rule.page

    def due_of(self, pairs: list[tuple[Any, Any]]) -> Due:
        """Chunks from pairs of their blocks and of those that take their entries."""
        widths = self.rule.chunk_size // self.rule.page, self.rule.entries // self.rule.page
        sides = zip(*pairs, strict=True) if pairs else ([], [])
        arrays = [np.array(side, dtype=np.int64).reshape(-1, w) for side, w in zip(sides, widths, strict=True)]
        return Due(*map(torch.from_numpy, arrays))


def side_by_side(tables: list[Any]) -> Tensor:
    """Rows of different lengths as one int32 tensor."""
    table = np.zeros((len(tables), max(map(len, tables), default=0)), dtype=np.int32)
    for row, blocks in enumerate(tables):
        table[row, : len(blocks)] = blocks
    return torch.from_numpy(table)


def most_at_once(scheduler: Any) -> int:
    """Tokens of the longest prompt that always fits one step, beside a token for each request that generates."""
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    rest = max(0, budget - scheduler.max_num_seqs)
    return min(rest, scheduler.long_prefill_token_threshold or rest)


def neighbours(rows: list[int]) -> list[range]:
    """Runs of consecutive numbers of an ascending list."""
    breaks = [at for at in range(1, len(rows)) if rows[at] != rows[at - 1] + 1]
    edges = [0, *breaks, len(rows)] if rows else []
    return [range(rows[a], rows[b - 1] + 1) for a, b in itertools.pairwise(edges)]


def register_backend_class() -> None:
    """Put the plugin in the place of vLLM's CPU backend; the CPU platform asks for no other."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{ClusteredBackend.__qualname__}")
