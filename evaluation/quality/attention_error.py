"""How far a compressed cache changes the output of attention, layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvcluster.fast.huggingface.hooks import attention_modules

from .scoring import copy_rows, read

__all__ = ["attention_errors"]


@torch.inference_mode()
def attention_errors(model: Any, full: Any, cache: Any, tokens: list[int], *, is_stepwise: bool = False) -> list[float]:
    """Relative error of the output of each attention module, with `cache` in place of `full`.

    Parameters
    ----------
    full, cache : two caches of one context; both are left as they are.
    tokens : tokens that follow the context.
    is_stepwise : give them to `cache` one by one.

    Returns
    -------
    For each layer `|output - true| / |true|`, Euclidean lengths over all tokens and features, where the output is
    that of the whole attention module, after its last projection.

    Notes
    -----
    Both get the same queries: the tokens run through the model with `full`, and the input of each attention module is
    used again when they run with `cache`. So a layer's error is its own, without that of the layers before it.
    """
    row = torch.tensor([tokens], device=model.device)
    modules = attention_modules(model)
    inputs, true = [list[Tensor]() for _ in modules], [list[Tensor]() for _ in modules]
    with watched(modules, inputs, true, None):
        read(model, copy_rows(full), row)
    outputs = [list[Tensor]() for _ in modules]
    with watched(
        modules, [list[Tensor]() for _ in modules], outputs, [input_of_module[0] for input_of_module in inputs]
    ):
        read(model, copy_rows(cache), row, is_stepwise=is_stepwise)
    errors = []
    for ours, theirs in zip(outputs, true, strict=True):
        difference = torch.cat(ours, dim=1) - theirs[0]
        errors.append(float(difference.norm() / theirs[0].norm()))
    return errors


@contextmanager
def watched(
    modules: list[Any], inputs: list[list[Tensor]], outputs: list[list[Tensor]], replaced: list[Tensor] | None
) -> Iterator[None]:
    """Within, each call adds to `inputs` and `outputs` of its module; `replaced` takes the place of all inputs."""

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # (batch, tokens, features)
        index = modules.index(module)
        if replaced is not None:
            n_seen = sum(states.shape[1] for states in inputs[index])
            hidden = replaced[index][:, n_seen : n_seen + hidden.shape[1]]
        inputs[index].append(hidden)
        return ((), {**kwargs, "hidden_states": hidden}) if "hidden_states" in kwargs else ((hidden, *args[1:]), kwargs)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        outputs[modules.index(module)].append(output[0])

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
