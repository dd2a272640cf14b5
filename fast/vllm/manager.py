"""The scheduler's side: which blocks a request takes and which it may give back."""

from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

__all__ = ["ClusteredManager"]


class ClusteredManager(FullAttentionManager):
    """Holds no block in the hole of a clustered chunk; the list of blocks keeps its length.

    A prompt that fits one step is never split, and never holds its holes: the worker reads it from memory of its own
    and stores what is kept. Of a longer one the exact keys and values are held until it is whole.
    """

    def __init__(self, kv_cache_spec: Any, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self.rule, self.most_at_once = kv_cache_spec.rule, kv_cache_spec.most_at_once
        self._n_prompt = 0  # of the request that is being given blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what the worker no longer reads after `processed_computed_tokens`; called before blocks are given.

        The worker clusters a chunk in the very step that processes the last token needed; vLLM leaves steps in flight
        out of the number, so the chunk is clustered already, and no step that reads its hole is still to run.
        """
        if num_prompt_tokens is None:
            raise ValueError("kvcluster: num_prompt_tokens must be given, got None: another version of vLLM?")
        self._n_prompt = num_prompt_tokens
        blocks = self.req_to_blocks.get(request_id, [])
        for chunk in reversed(range(self.rule.n_chunks(processed_computed_tokens, num_prompt_tokens))):
            hole = self.rule.hole(chunk)
            if blocks[hole.stop - 1] is self._null_block:  # and so are those before
                break
            self._remove_blocks_in_range(request_id, hole.start, hole.stop)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **options: Any
    ) -> int:
        n_blocks = super().get_num_blocks_to_allocate(
            request_id, num_tokens, *args, apply_admission_cap=apply_admission_cap, **options
        )
        if self.req_to_blocks.get(request_id):
            return n_blocks
        if apply_admission_cap:  # asked of all the tokens of a request that waits, whose prompt is not known yet
            return n_blocks - (self.n_in_holes(num_tokens, 0) if num_tokens <= self.most_at_once else 0)
        if num_tokens < self._n_prompt <= self.most_at_once:  # a piece of what shall not be split: later, whole
            return self.block_pool.num_gpu_blocks + 1
        return n_blocks - self.n_in_holes(num_tokens, self._n_prompt)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        if blocks:
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        n_chunks = self.rule.n_chunks(num_tokens, self._n_prompt)
        holes = {place for chunk in range(n_chunks) for place in self.rule.hole(chunk)}
        n_blocks = -(-num_tokens // self.block_size)
        real = iter(self.block_pool.get_new_blocks(n_blocks - len(holes)))
        blocks.extend(self._null_block if place in holes else next(real) for place in range(n_blocks))
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in blocks if not block.is_null)
        return list(blocks)

    def n_in_holes(self, n_tokens: int, n_prompt: int) -> int:
        """Blocks that a request need not be given for a first step of `n_tokens` tokens."""
        return sum(len(self.rule.hole(chunk)) for chunk in range(self.rule.n_chunks(n_tokens, n_prompt)))
