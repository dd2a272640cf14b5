"""The scheduler's side: which blocks a request may give back."""

from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

__all__ = ["ClusteredManager"]


class ClusteredManager(FullAttentionManager):
    """Frees the holes of chunks that have been clustered, and keeps the list of blocks as long as it was."""

    def __init__(self, kv_cache_spec: Any, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self.rule = kv_cache_spec.rule

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what the worker no longer reads after `processed_computed_tokens`.

        The worker clusters a chunk in the very step that processes the last token needed; vLLM leaves steps in flight
        out of the number, so the chunk is clustered already, and no step that reads its hole is still to run.
        """
        if num_prompt_tokens is None:
            raise ValueError("kvcluster: num_prompt_tokens must be given, got None: another version of vLLM?")
        blocks = self.req_to_blocks.get(request_id, [])
        for chunk in reversed(range(self.rule.n_chunks(processed_computed_tokens, num_prompt_tokens))):
            hole = self.rule.hole(chunk)
            if blocks[hole.stop - 1] is self._null_block:  # and so are those before
                break
            self._remove_blocks_in_range(request_id, hole.start, hole.stop)
