"""What a folder must be for a model to be loaded from it. Nothing in it is trusted.

Checked before anything large is allocated: that there is no code to run and nothing that leads out of the folder, that
the sizes and numbers of `config.json` are some that a model can have, and that its weights are floats of the shapes
which follow from these.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvcluster.fast.outside import read_json, shown

__all__ = ["check_folder", "check_names", "check_shapes", "weight_files"]

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
ELSEWHERE = ("adapter_config.json", "shard-*.safetensors")  # the names of other weights than those looked at here
ABSENT = {
    "auto_map": "code of a folder is never run",
    "quantization_config": "weights are read as they are",
    "compression_config": "weights are read as they are",
    "transformers_weights": f"weights are in {SAFETENSORS}",
    "fusion_config": "layers are transformers' own",
    **dict.fromkeys(
        ("text_config", "decoder", "generator", "text_encoder"), "a model with others inside is not served"
    ),
}
CHOSEN = ("attn_implementation", "experts_implementation")  # by us: they can name code of the hub
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
MOST = {**dict.fromkeys(SIZES, 2**20), "num_hidden_layers": 1000}
MOST |= {"max_position_embeddings": 2**31 - 1, "sliding_window": 2**31 - 1}
POSITIVE = {"rope_theta", "rope_local_base_freq", "factor", "rms_norm_eps", "query_pre_attn_scalar"}
FLOATS = {"F64", "F32", "F16", "BF16"}


def check_folder(folder: Path) -> str:
    """The model type in the `config.json` of a folder, if nothing is wrong with its files and what they ask for.

    Raises
    ------
    ValueError : the first thing that is wrong.
    """
    from transformers import PretrainedConfig

    for path in sorted(folder.iterdir()):
        if not path.is_file() and not path.is_dir():  # a pipe would be waited for
            raise ValueError(f"it must hold plain files, got {shown(path.name)}")
        if any(path.match(name) for name in ELSEWHERE):
            raise ValueError(f"it must hold a whole model and nothing else, got {shown(path.name)}")
    config = described(folder, "config.json")
    for name in config:
        if callable(getattr(PretrainedConfig, name, None)):
            raise ValueError(f"config.json must hold values, no methods of its class, got {shown(name)}")
    check_numbers(config)
    if (folder / "tokenizer_config.json").exists():
        described(folder, "tokenizer_config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type.isidentifier():
        raise ValueError(f"model_type of config.json must be a name, got {shown(model_type)}")
    return model_type


def described(folder: Path, file: str) -> dict[str, Any]:
    """The JSON object in a file, which asks for nothing that is not ours to choose."""
    config = read_json(folder / file, file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} must be a JSON object, got {shown(config)}")
    for name, value in config.items():
        if name in ABSENT and value is not None:
            raise ValueError(f"{name} of {file} must be absent, as {ABSENT[name]}, got {shown(value)}")
        if name.strip("_").removesuffix("_internal") in CHOSEN and value not in (None, "sdpa"):
            raise ValueError(f"{name} of {file} must be absent or sdpa, got {shown(value)}")
    return config


def check_numbers(config: dict[str, Any]) -> None:
    """Refuse sizes and other numbers that no model has."""
    for name, most in MOST.items():
        size = config.get(name)
        if size is not None and type(size) is not int:
            raise ValueError(f"{name} of config.json must be an integer, got {shown(size)}")
        if size is not None and not 1 <= size <= most:
            raise ValueError(f"{name} of config.json must be from 1 to {most}, got {size}")
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        rule = f"num_attention_heads of config.json must be a multiple of num_key_value_heads, {kv_heads}"
        raise ValueError(f"{rule}, got {heads}")
    if (config.get("head_dim") or 0) % 2:
        raise ValueError(f"head_dim of config.json must be even, got {config['head_dim']}")
    for name, value in numbers(config):
        if name.split(".")[-1] in POSITIVE and value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} of config.json must be a number, got {shown(value)}")
            if value <= 0:
                raise ValueError(f"{name} of config.json must be above 0, got {value}")


def numbers(config: dict[str, Any], inside: str = "") -> Iterable[tuple[str, Any]]:
    """The values of an object and of those inside it, as (key, value)."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{inside}{name}.")
        else:
            yield f"{inside}{name}", value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights.

    Raises
    ------
    ValueError : there are none, or pickles; an index of other files than those of the folder.
    """
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, INDEX)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict):
            raise ValueError(f"weight_map of {INDEX} must be a JSON object, got {shown(places)}")
        safe = {path.name for path in folder.glob("*.safetensors") if path.is_file()}
        for file in places.values():
            if not isinstance(file, str) or file not in safe:
                raise ValueError(f"weight_map of {INDEX} must name safetensors files of the folder, got {shown(file)}")
        return [folder / file for file in sorted(set(places.values()))]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"weights must be safetensors, as reading a pickle can run any code, got {pickles[0]}: load it where you "
            "trust it and write it anew by model.save_pretrained(FOLDER)"
        )
    raise ValueError(f"weights must be safetensors, got no file named {SAFETENSORS}")


def check_shapes(files: list[Path], model: Any) -> None:
    """Refuse files with other tensors than those of `model`, which may be on the device "meta". Only headers are read.

    Raises
    ------
    SafetensorError : a damaged file. ValueError : the first tensor that differs.
    """
    from safetensors import safe_open

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                tensor, known = opened.get_slice(name), in_model(name, expected)
                found.add(known)
                if known in expected and tuple(tensor.get_shape()) != expected[known]:
                    raise ValueError(f"{name} must have shape {expected[known]}, got {tuple(tensor.get_shape())}")
                if tensor.get_dtype() not in FLOATS:
                    raise ValueError(f"{name} must be floats of at least 16 bits, got {tensor.get_dtype()}")
    check_names(model, missing=set(expected) - found, unknown=found - set(expected))


def in_model(name: str, expected: dict[str, Any]) -> str:
    """A tensor's name as the model with its head has it; a file may be of the model without."""
    return name if name in expected or f"model.{name}" not in expected else f"model.{name}"


def check_names(model: Any, *, missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Refuse weights that are missing, or that the model has not, but for those which follow from others.

    Raises
    ------
    ValueError : the first of them.
    """
    tied = model.config.tie_word_embeddings
    for rule, names in (("must have", missing), ("must not have", unknown)):
        for name in sorted(names):
            if not (tied and name == "lm_head.weight") and not name.endswith("rotary_emb.inv_freq"):
                raise ValueError(f"it {rule} {name if name.isprintable() else ascii(name)}")
