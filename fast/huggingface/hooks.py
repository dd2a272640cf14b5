"""The hooks by which a model attends to our caches: each attention module is told of its layer, before and after."""

import copy
import inspect
import threading
import weakref
from typing import Any, ClassVar

import torch
from torch import nn

from .attention import NAME
from .compiling import uncompiled

__all__ = ["ATTENTION", "ModelHooks", "attention_modules", "check_model", "decoder_of", "head_dim"]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text")
ONE_MASK = ("llama", "mistral")  # models that mask all their layers alike and do not read `layer_types`
LAYER_TYPES = ("full_attention", "sliding_attention")
REQUIRED = {
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "is_causal": True,
    "is_heterogeneous": False,
}
ATTENTION = ("sdpa", "eager")
LOCK = threading.RLock()  # held while hooks come and go; a thread may drop hooks while it makes others


def check_model(model: Any, attention: tuple[str, ...] = ATTENTION) -> Any:
    """The config of `model`, if it is one that hooks can serve, with one of the kinds of `attention`.

    Raises
    ------
    ValueError : another type of model or of attention, or a field of the config with a value that is not served.
    """
    adapters: Any = getattr(model, "peft_config", None) or {}
    for name, adapter in adapters.items():
        if "PREFIX" in str(getattr(adapter, "peft_type", "")):
            rule = "adapters of model must not be prefix tuning, which passes a cache of its own to the model"
            raise ValueError(f"{rule} in the place of this one, got {name!r}")
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model must be of type {' or '.join(MODEL_TYPES)}, got {model_type}")
    if config._attn_implementation not in attention:
        raise ValueError(f"attention of model must be {' or '.join(attention)}, got {config._attn_implementation}")
    n_modules = len(attention_modules(model))
    if config.num_hidden_layers != n_modules:
        rule = f"num_hidden_layers of model must be its attention modules, {n_modules}"
        raise ValueError(f"{rule}, got {config.num_hidden_layers}")
    for field, required in REQUIRED.items():
        value = getattr(config, field, required)
        if bool(value) != bool(required):
            raise ValueError(f"{field} of model must be {required}, got {value}")
    layer_types, allowed = getattr(config, "layer_types", None), () if model_type in ONE_MASK else LAYER_TYPES
    if not set(layer_types or ()) <= set(allowed):
        rule = " or ".join(allowed) or f"absent, as {model_type} masks all layers alike"
        raise ValueError(f"layer_types of model must be {rule}, got {layer_types}")
    if "sliding_attention" in (layer_types or ()) and config.sliding_window is None:
        raise ValueError("sliding_window of model must be set for the sliding layers in its layer_types, got None")
    return config


def head_dim(config: Any) -> int:
    """Features of a key."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def attention_modules(model: Any) -> list[Any]:
    """The modules of `model` that attend, in the order of their layers."""
    modules = [x for x in model.modules() if hasattr(x, "layer_idx") and hasattr(x, "num_key_value_groups")]
    return sorted(modules, key=lambda module: module.layer_idx)


def decoder_of(model: Any) -> Any:
    """The module of `model` whose forward calls the layers, whatever wraps it: adapters, a compiler, a head."""
    first = attention_modules(model)[0]
    parts = next(name for name, x in model.named_modules() if x is first).split(".")  # such as model.layers.0.self_attn
    number = next(place for place, part in enumerate(parts) if part.isdigit())
    return model.get_submodule(".".join(parts[: number - 1]))


class ModelHooks:
    """The hooks on one model, shared by all caches made for it and removed with the last of them.

    Attention modules of a model that runs `sdpa` are given a copy of their config that names our attention function,
    as long as the hooks exist; the config of the model stays as it is. With `eager`, which must return its weights, the
    log counts go into the mask.
    A copy made of the model meanwhile keeps copied hooks; they too leave calls with other caches alone.

    Attributes
    ----------
    model : weak reference to the base model, without head, of the one that was given.

    Notes
    -----
    Caches of one model may be made and dropped by several threads at once. The last hooks may go while new ones are
    made: a lock keeps the two apart, and the new ones keep what the modules had before any hooks.
    """

    _by_model: ClassVar[weakref.WeakKeyDictionary[nn.Module, weakref.ref["ModelHooks"]]] = weakref.WeakKeyDictionary()
    _configs: ClassVar[weakref.WeakKeyDictionary[nn.Module, list[Any]]] = weakref.WeakKeyDictionary()  # without hooks

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)
        handles = [model.register_forward_pre_hook(check_call, with_kwargs=True)]
        handles.append(model.register_forward_hook(after_call, with_kwargs=True))
        for module in attention_modules(model):
            handles.append(module.register_forward_pre_hook(before_attention, with_kwargs=True))
            handles.append(module.register_forward_hook(after_attention, with_kwargs=True))
        modules = attention_modules(model)
        self.configs = list(zip(modules, self._configs.setdefault(model, [x.config for x in modules]), strict=True))
        weakref.finalize(self, remove, handles, self.configs, self.model)
        self.served: str | None = None
        self.serve(model.config._attn_implementation)

    def serve(self, attention: str) -> None:
        """Let the modules run our attention in place of `sdpa`, and their own if the model has changed to another."""
        if attention == self.served:
            return
        for module, config in self.configs:
            module.config = config
            if attention == "sdpa":
                module.config = copy.copy(config)
                module.config._attn_implementation = NAME
        self.served = attention

    @classmethod
    def of(cls, model: nn.Module) -> "ModelHooks":
        """The hooks on `model`, new ones if there are none."""
        base = decoder_of(model)
        with LOCK:
            hooks = cls.known(base)
            if hooks is None:
                hooks = cls(base)
                cls._by_model[base] = weakref.ref(hooks)
            return hooks

    @classmethod
    def known(cls, base: nn.Module) -> "ModelHooks | None":
        """The hooks on a base model, if there are any."""
        reference = cls._by_model.get(base)
        return None if reference is None else reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelHooks":
        return self  # a copied cache serves the same model


def remove(handles: list[Any], configs: list[tuple[Any, Any]], model: "weakref.ref[Any]") -> None:
    """Take the hooks off, and give back the configs unless new hooks have come in their place."""
    with LOCK:
        for handle in handles:
            handle.remove()
        base = model()
        if base is None or ModelHooks.known(base) is not None:
            return
        ModelHooks._configs.pop(base, None)
        for module, config in configs:
            module.config = config


def arguments_of(module: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model was called with, by name."""
    arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**arguments, **arguments.get("kwargs", {})}


def our_cache(arguments: dict[str, Any]) -> Any:
    """The cache that the model was called with, if it is one of ours."""
    cache: Any = arguments.get("past_key_values")
    return cache if getattr(cache, "is_kvcluster", False) else None


def our_layer(module: Any, arguments: dict[str, Any]) -> Any:
    """The layer of our cache for an attention module, if it is ours too and not one of transformers' sliding ones."""
    cache = our_cache(arguments)
    layer = None if cache is None else cache.layers[module.layer_idx]
    return None if layer is None or layer.is_sliding else layer


@uncompiled
def check_call(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model: layers learn of padding, and must be in step."""
    hooks, attention = ModelHooks.known(module), module.config._attn_implementation
    if hooks is not None:
        hooks.serve(attention)
    arguments = arguments_of(module, args, kwargs)
    cache, mask = our_cache(arguments), arguments.get("attention_mask")
    if cache is None:
        return
    if attention not in cache.attention:
        raise ValueError(f"attention of model must be {' or '.join(cache.attention)}, got {attention}")
    if arguments.get("use_cache") is False:  # generate feeds all tokens again at each step then
        raise ValueError(f"use_cache must not be False with a {type(cache).__name__}: pass none to do without")
    cache.check_whole()
    new = next(x for x in map(arguments.get, ("input_ids", "inputs_embeds")) if x is not None)
    if new.shape[1] == 0:
        rule = f"input_ids must hold a token behind the {cache.n_seen} that the cache has seen"
        raise ValueError(f"{rule}, got none: for another prompt reset() the cache, or crop it")
    padding = left_padding(mask, cache, new.shape[1])
    check_tokens_are_new(arguments.get("input_ids"), cache)
    for layer in cache.own_layers:
        layer.is_announced, layer.padding = False, padding
    cache.begun = cache.n_seen


@uncompiled
def after_call(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the base model: the call has not failed halfway."""
    cache = our_cache(arguments_of(module, args, kwargs))
    if cache is not None:
        cache.begun = None


def check_tokens_are_new(tokens: Any, cache: Any) -> None:
    """Refuse a prompt that the cache has seen, and nothing else: it would be read once more, behind itself.

    The first tokens are remembered until the next come.
    """
    prompt = cache.prompt
    are_alike = prompt is not None and tokens is not None and tokens.shape == prompt.shape
    if are_alike and cache.n_seen == tokens.shape[1] and torch.equal(tokens, prompt):
        raise ValueError(
            f"input_ids must be new tokens, or the {cache.n_seen} that the cache has seen and new ones behind them, "
            "got just those that it has seen: to generate from them, crop(-1) the cache first"
        )
    cache.prompt = tokens.detach().clone() if cache.n_seen == 0 and tokens is not None else None


def left_padding(mask: Any, cache: Any, n_new: int) -> list[int] | None:
    """Padding of each row in `mask` (batch, tokens seen and `n_new` new ones); None if there is none.

    Raises
    ------
    ValueError : a mask of another kind; padding that is not on the left; padding that earlier calls did not have.
    """
    name = f"attention_mask with a {type(cache).__name__}"
    earlier = cache.padding
    if mask is None:
        if earlier is not None and any(earlier):
            raise ValueError(f"{name} must repeat the padding of earlier calls, got None")
        return earlier
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise ValueError(f"{name} must be (batch, tokens), got {tuple(getattr(mask, 'shape', ())) or type(mask)}")
    if mask.shape[1] != cache.n_seen + n_new:
        rule = f"{name} must have a column for each of {cache.n_seen} tokens seen and {n_new} new ones"
        raise ValueError(f"{rule}, got {mask.shape[1]}")
    is_real = mask != 0
    if earlier is None and bool(is_real.all()):
        return None
    if bool((is_real[:, :-1] & ~is_real[:, 1:]).any()):
        raise ValueError(
            f"{name} must have its padding on the left, before all tokens of a row, got zeros after ones: questions of "
            "different lengths behind one text are asked one by one, each of a copy.deepcopy of the cache"
        )
    padding: list[int] = (~is_real).sum(dim=1).tolist()
    n_seen = cache.n_seen
    if n_seen:
        before = [min(n_seen, n) for n in padding]
        earlier = [0] * len(padding) if earlier is None else earlier
        if before != earlier:
            raise ValueError(f"{name} must repeat the padding of earlier calls, {earlier}, got {before}")
    return padding


@uncompiled
def before_attention(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of an attention module: its layer for our attention function, or log counts in its mask."""
    layer = our_layer(module, kwargs)
    if layer is None:
        return None
    layer.is_announced, layer.is_attended = True, False
    layer.has_own_attention = module.config._attn_implementation == NAME
    if layer.has_own_attention:
        return args, {**kwargs, "kvcluster_layer": layer}
    mask = kwargs.get("attention_mask")
    if hasattr(mask, "has_log_counts"):  # a copied model has the hook twice, copied and its own
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # (batch, queries, features)
    biased = layer.mask_with_log_counts(mask, hidden.shape[1], module.num_key_value_groups)
    if biased is not mask:
        biased.has_log_counts = True
    return args, {**kwargs, "attention_mask": biased}


@uncompiled
def after_attention(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of an attention module: the new tokens have been attended to, their layer may cluster."""
    layer = our_layer(module, kwargs)
    if layer is None:
        return
    if layer.is_announced or (layer.has_own_attention and not layer.is_attended):
        raise RuntimeError(
            f"attention of layer {module.layer_idx} must be transformers' own, which asks its cache and its attention "
            f"function: the forward of its {type(module).__name__} has been replaced"
        )
    layer.finish()
