"""The worker's side: which attention, which builder and which pages a model gets."""

from typing import Any, ClassVar

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from .settings import Settings, check_engine, settings_of
from .spec import ClusteredSpec

__all__ = ["ClusteredBackend", "register_backend_class"]


class ClusteredBackend(CPUAttentionBackend):
    """vLLM's CPU backend where nothing is asked of the plugin; else its layout, with clustered pages."""

    # Of the model that was loaded last, if it asked for the plugin: its settings, and `most_at_once` of its scheduler.
    asked: ClassVar[tuple[Settings, int] | None] = None

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The first thing that a model asks when it is built, with the engine's options at hand."""
        config = get_current_vllm_config()
        settings = settings_of(config)
        ClusteredBackend.asked = None
        if settings is None:
            return CPUAttentionBackendImpl
        check_engine(config)
        settings.rule(config.cache_config.block_size)  # refuses what does not fit, before the weights are read
        ClusteredBackend.asked = settings, most_at_once(config.scheduler_config)
        from .attention import ClusteredAttention

        return ClusteredAttention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        if ClusteredBackend.asked is None:
            return CPUAttentionMetadataBuilder
        from .builder import ClusteredBuilder

        return ClusteredBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if cls.asked is None:
            return spec
        settings, longest = cls.asked
        return ClusteredSpec.of(spec, settings.rule(spec.block_size), longest)


def most_at_once(scheduler: Any) -> int:
    """Tokens of the longest prompt that always fits one step, beside a token for each request that generates."""
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    beside_generation = max(0, budget - scheduler.max_num_seqs)
    return min(beside_generation, scheduler.long_prefill_token_threshold or beside_generation)


def register_backend_class() -> None:
    """Put the plugin in the place of vLLM's CPU backend; the CPU platform asks for no other."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{ClusteredBackend.__qualname__}")
