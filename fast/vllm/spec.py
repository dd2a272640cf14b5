"""What the scheduler must know of the pages: their size, a count for each entry included, and the rule."""

from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST, KVCacheSpecRegistry

from .manager import ClusteredManager
from .pages import COUNT_BYTES
from .rule import PageRule

__all__ = ["ClusteredSpec", "register_spec"]


@dataclass(frozen=True, kw_only=True)
class ClusteredSpec(FullAttentionSpec):
    """Full attention whose pages hold counts. What a page holds depends on the request, so no prefix is shared.

    Attributes
    ----------
    rule : which pages hold what.
    most_at_once : tokens of the longest prompt that always fits one step.
    """

    rule: PageRule
    most_at_once: int

    @property
    def prefix_cacheable(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of the longest request; where its prompt may take several steps, vLLM's own answer."""
        n_tokens = vllm_config.model_config.max_model_len
        if n_tokens > self.most_at_once:
            return super().max_memory_usage_bytes(vllm_config)
        return self.rule.most_pages(n_tokens) * self.page_size_bytes

    @classmethod
    def of(cls, spec: FullAttentionSpec, rule: PageRule, most_at_once: int) -> Self:
        """`spec` with cells that have room for a count."""
        numbers = {field.name: getattr(spec, field.name) for field in fields(spec)}
        numbers["state_content_bytes"] = spec.state_content_size_bytes + COUNT_BYTES
        return cls(**numbers, rule=rule, most_at_once=most_at_once)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The spec of a group of layers, which are all alike."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError(f"kvcluster: the layers of a group must have one spec, got {set(map(str, specs))}")
        return specs[0]


def register_spec() -> None:
    """Tell vLLM which manager keeps the blocks of such pages. Its own specs must come first: it looks whether any are
    there."""
    if not _REGISTRY_KVCACHESPEC_LIST:
        register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(
        ClusteredSpec, manager_class=ClusteredManager, uniform_type_base_spec=FullAttentionSpec
    )
