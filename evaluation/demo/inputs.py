"""What the demo works on: a local Llama and a text long enough, or one clear line about what is wrong."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors import SafetensorError

from ..models import load_llama, smollm2_folder

__all__ = ["UnusableInputError", "load_model", "load_tokens", "read_text"]


class UnusableInputError(Exception):
    """The user's input cannot be used; the message says why, in one line."""


def load_model(folder: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer, from `folder` or SmolLM2."""
    try:
        return load_llama(smollm2_folder() if folder is None else folder)
    except (OSError, ValueError) as error:
        raise UnusableInputError(" ".join(str(error).split())) from error
    except (RuntimeError, SafetensorError) as error:  # other shapes than those of config.json; a damaged file
        message = " ".join(str(error).split())
        raise UnusableInputError(
            f"model must have the weights that its config.json asks for, got {folder}: {message}"
        ) from error


def read_text(path: Path) -> str:
    """The content of a text file."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableInputError(f"text must be a readable UTF-8 file, got {path}: {error}") from error


def load_tokens(text: str | None, tokenizer: Any, wanted: int) -> torch.Tensor:
    """The first `wanted` tokens, (1, wanted), of `text` or, without one, of the Python language reference."""
    if text is None:
        text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :wanted]
    if tokens.shape[1] < wanted:
        raise UnusableInputError(f"text must have at least {wanted} tokens, got {tokens.shape[1]}")
    return tokens
