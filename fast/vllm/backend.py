"""The worker's side: what each step does with each request, worked out once for all layers."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
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
from .settings import Settings, check_engine, settings_of
from .spec import ClusteredSpec

__all__ = ["ClusteredBackend", "ClusteredBuilder", "ClusteredMetadata", "register_backend_class"]


class ClusteredBackend(CPUAttentionBackend):
    """vLLM's CPU backend where nothing is asked of the plugin; else its layout, with clustered pages."""

    settings: ClassVar[Settings | None] = None  # of the model that was loaded last in this process

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The first thing that a model asks when it is built, with the engine's options at hand."""
        config = get_current_vllm_config()
        ClusteredBackend.settings = settings = settings_of(config)
        if settings is None:
            return CPUAttentionBackendImpl
        check_engine(config)
        settings.rule(config.cache_config.block_size)
        from .attention import ClusteredAttention

        return ClusteredAttention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CPUAttentionMetadataBuilder if ClusteredBackend.settings is None else ClusteredBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return spec if cls.settings is None else ClusteredSpec.of(spec, cls.settings.rule(spec.block_size))


@dataclass
class ClusteredMetadata:
    """A step: requests without clusters go to vLLM's kernel, in runs of neighbours, the others to ours.

    Attributes
    ----------
    rule : the rule.
    runs : tokens of the batch, and what vLLM's kernel wants to know of them.
    tokens : tokens of the batch whose requests have clusters, (n,), int64.
    tables, requests : as in `attend_pages`.
    due : (chunks, pages), int64: blocks of the chunks that are clustered after this step's attention.
    """

    rule: PageRule
    runs: list[tuple[slice, CPUAttentionMetadata]]
    tokens: Tensor
    tables: Tensor
    requests: Tensor
    due: Tensor


class ClusteredBuilder(CPUAttentionMetadataBuilder):
    """Evaluates the rule for every request of a step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rule: PageRule = kv_cache_spec.rule
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
        starts = common.query_start_loc_cpu.numpy()
        ends, prompts = common.seq_lens.numpy(), common.rswa_prefix_lens.numpy()
        requests, tables, due, exact = [], [], [], []
        for row in range(common.num_reqs):
            n_new, n_tokens = int(starts[row + 1] - starts[row]), int(ends[row])
            before = rule.n_chunks(n_tokens - n_new, int(prompts[row]))
            after = rule.n_chunks(n_tokens, int(prompts[row]))
            blocks = common.block_table_tensor[row].numpy()
            due += [blocks[list(rule.pages_of(chunk))] for chunk in range(before, after)]
            if before == 0:
                exact.append(row)
                continue
            counted = rule.n_sink // rule.page
            uncounted = counted + before * (rule.entries // rule.page)
            requests.append((int(starts[row]), n_new, rule.n_stored(n_tokens, before), counted, uncounted))
            tables.append(blocks[rule.kept_pages(n_tokens, before)])
        table = np.zeros((len(tables), max(map(len, tables), default=0)), dtype=np.int32)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = blocks
        tokens = [np.arange(first, first + n_new) for first, n_new, *_ in requests]
        return ClusteredMetadata(
            rule=rule,
            runs=[self.run_of(common, run) for run in neighbours(exact)],
            tokens=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *tokens])),
            tables=torch.from_numpy(table),
            requests=torch.tensor(requests, dtype=torch.int64).reshape(-1, 5),
            due=torch.from_numpy(np.array(due, dtype=np.int64).reshape(len(due), rule.chunk_size // rule.page)),
        )

    def run_of(self, common: CommonAttentionMetadata, rows: range) -> tuple[slice, CPUAttentionMetadata]:
        """What vLLM's kernel wants to know of neighbouring requests."""
        of_rows = slice(rows.start, rows.stop)
        starts = common.query_start_loc[rows.start : rows.stop + 1]
        tokens = slice(int(starts[0]), int(starts[-1]))
        part = common.replace(
            num_reqs=len(rows),
            num_actual_tokens=tokens.stop - tokens.start,
            query_start_loc=starts - starts[0],
            seq_lens=common.seq_lens[of_rows],
            max_query_len=int(starts.diff().max()),
            max_seq_len=int(common.seq_lens[of_rows].max()),
            block_table_tensor=common.block_table_tensor[of_rows],
            slot_mapping=common.slot_mapping[tokens],
        )
        return tokens, super().build(0, part)


def neighbours(rows: list[int]) -> list[range]:
    """Runs of consecutive numbers of an ascending list."""
    breaks = [at for at in range(1, len(rows)) if rows[at] != rows[at - 1] + 1]
    edges = [0, *breaks, len(rows)] if rows else []
    return [range(rows[a], rows[b - 1] + 1) for a, b in itertools.pairwise(edges)]


def register_backend_class() -> None:
    """Put the plugin in the place of vLLM's CPU backend; the CPU platform asks for no other."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{ClusteredBackend.__qualname__}")
