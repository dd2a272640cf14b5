"""Log counts on their way to attention: forward hooks that add them to the mask of each layer."""

import inspect
import weakref
from typing import Any, ClassVar

import torch
from torch import nn

__all__ = ["LogCountHooks", "check_model"]

MODEL_TYPES = ("llama",)
ATTENTION = ("sdpa", "eager")


def check_model(model: Any) -> Any:
    """The config of `model`, if it is one that hooks can serve."""
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model must be of type {' or '.join(MODEL_TYPES)}, got {model_type}")
    if config._attn_implementation not in ATTENTION:
        raise ValueError(f"attention of model must be {' or '.join(ATTENTION)}, got {config._attn_implementation}")
    return config


class LogCountHooks:
    """The hooks on one model, shared by all caches made for it and removed with the last of them.

    A copy made of the model meanwhile keeps copied hooks; they too leave calls with other caches alone.
    """

    _of_model: ClassVar[weakref.WeakKeyDictionary[nn.Module, weakref.ref["LogCountHooks"]]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self, model: Any) -> None:
        handles = [model.base_model.register_forward_pre_hook(check_call, with_kwargs=True)]
        for module in model.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups"):
                handles.append(module.register_forward_pre_hook(add_log_counts, with_kwargs=True))
        weakref.finalize(self, remove, handles)

    @classmethod
    def of(cls, model: nn.Module) -> "LogCountHooks":
        """The hooks on `model`, new ones if there are none."""
        known = cls._of_model.get(model)
        hooks = known() if known is not None else None
        if hooks is None:
            hooks = cls(model)
            cls._of_model[model] = weakref.ref(hooks)
        return hooks

    def __deepcopy__(self, memo: dict[int, Any]) -> "LogCountHooks":
        return self  # a copied cache serves the same model


def remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def clustered_layers(arguments: dict[str, Any]) -> Any:
    """The layers of the cache that the model was called with, if it is one with log counts."""
    cache: Any = arguments.get("past_key_values")
    return cache.layers if getattr(cache, "has_log_counts", False) else None


def check_call(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model: no padding may enter a cluster, and the layers must be in step."""
    arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    layers, mask = clustered_layers(arguments | arguments.get("kwargs", {})), arguments.get("attention_mask")
    if layers is None:
        return
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2 and bool(mask.all())):
        raise ValueError(
            "attention_mask must be (batch, tokens) and all ones with a ClusteredCache: padding is not supported"
        )
    seen = sorted({layer.get_seq_length() for layer in layers})
    if len(seen) > 1:
        raise RuntimeError(
            f"the layers of the cache must have seen the same tokens, got {seen[0]} to {seen[-1]}: "
            "an earlier call failed halfway; call reset() and start again"
        )
    for layer in layers:
        layer.is_mask_ready = False


def add_log_counts(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of an attention layer: its mask, with the log counts of what its cache holds."""
    layers = clustered_layers(kwargs)
    mask = kwargs.get("attention_mask")
    if layers is None or hasattr(mask, "has_log_counts"):  # a copied model has the hook twice, copied and its own
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # (batch, queries, features)
    # PyTorch's attention takes a float32 mask beside 16-bit queries on the CPU only.
    dtype = torch.float32 if hidden.device.type == "cpu" else hidden.dtype
    biased = layers[module.layer_idx].mask_with_log_counts(mask, hidden.shape[1], module.num_key_value_groups, dtype)
    if biased is not mask:
        biased.has_log_counts = True
    return args, {**kwargs, "attention_mask": biased}
