"""What the scheduler must know of the pages: their size, a count for each entry included, and the rule."""

from dataclasses import dataclass, fields
from typing import Self

from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST, KVCacheSpecRegistry

from .manager import ClusteredManager
from .pages import COUNT_BYTES
from .rule import PageRule

__all__ = ["ClusteredSpec", "register_spec"]


@dataclass(frozen=True, kw_only=True)
class ClusteredSpec(FullAttentionSpec):
    """Full attention whose pages hold counts. What a page holds depends on the request, so no prefix is shared."""

    rule: PageRule

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @classmethod
    def of(cls, spec: FullAttentionSpec, rule: PageRule) -> Self:
        """`spec` with cells that have room for a count."""
        numbers = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(**numbers | {"state_content_bytes": spec.state_content_size_bytes + COUNT_BYTES}, rule=rule)

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
