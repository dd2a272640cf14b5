"""The worker's side: which attention, which builder and which pages a model gets."""

from typing import Any, ClassVar

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from .settings import check_engine, settings_of
from .spec import ClusteredSpec

__all__ = ["ClusteredBackend", "register_backend_class"]


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
        if ClusteredBackend.config is None:
            return CPUAttentionMetadataBuilder
        from .builder import ClusteredBuilder

        return ClusteredBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        settings = settings_of(cls.config)
        if cls.config is None or settings is None:
            return spec
        return ClusteredSpec.of(spec, settings.rule(spec.block_size), most_at_once(cls.config.scheduler_config))


def most_at_once(scheduler: Any) -> int:
    """Tokens of the longest prompt that always fits one step, beside a token for each request that generates."""
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    rest = max(0, budget - scheduler.max_num_seqs)
    return min(rest, scheduler.long_prefill_token_threshold or rest)


def register_backend_class() -> None:
    """Put the plugin in the place of vLLM's CPU backend; the CPU platform asks for no other."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{ClusteredBackend.__qualname__}")
