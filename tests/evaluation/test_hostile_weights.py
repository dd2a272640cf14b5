"""Weights and tokenizers of a folder are not trusted: those that its config asks for are loaded, others are named."""

import shutil
import struct

import pytest
import torch
from hostile_folders import change, why_not
from models import tiny_gemma, tiny_llama
from safetensors.torch import load_file, save_file

from kvcluster.evaluation import models
from kvcluster.evaluation.errors import UnusableInputError
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.texts import encode, load_tokens, opening
from kvcluster.fast.huggingface.hooks import MODEL_TYPES


def save_weights(folder, **changes):
    """Other tensors in the file; those that are None are taken out."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = {
    "one is missing": ({NAME: None}, f"got .*: it must have {NAME}"),
    "another shape": ({NAME: torch.ones(95, 64)}, rf"{NAME} must have shape \(96, 64\), got \(95, 64\)"),
    "one too many": ({"model.layers.1.own": torch.ones(3)}, r"it must not have model\.layers\.1\.own"),
    "NaN": ({NAME: torch.full((96, 64), float("nan"))}, f"{NAME} must be finite, got 6144 NaN"),
    "endless as float32": ({NAME: torch.full((96, 64), 1e300, dtype=torch.float64)}, f"{NAME} must be finite"),
    "codes": ({NAME: torch.ones(96, 64, dtype=torch.int8)}, f"{NAME} must be floats of at least 16 bits, got I8"),
    "floats of 8 bits": (
        {NAME: torch.ones(96, 64).to(torch.float8_e4m3fn)},
        f"{NAME} must be floats of .*, got F8_E4M3",
    ),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_refused_by_the_tensor(folder, kind):
    tensors, message = WEIGHTS[kind]
    save_weights(folder, **tensors)
    with pytest.raises(
        UnusableInputError, match=f"model must have the weights that its config.json asks for, .*{message}"
    ):
        load_model(folder, MODEL_TYPES)


def test_weights_that_transformers_would_make_up_are_refused(folder, monkeypatch):
    """Whatever the file's header says: what has been loaded is asked too."""
    save_weights(folder, **{NAME: None})
    monkeypatch.setattr(models, "check_shapes", lambda *_: None)
    with pytest.raises(UnusableInputError, match=f"asks for, got .*: it must have {NAME}"):
        load_model(folder, MODEL_TYPES)


def header(length, text=b"{}"):
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04K\x01.", header(2**63), header(2), header(10**6, b"{" * 10**6), "truncated"],
    ids=["nothing", "a pickle", "no end", "no tensors", "deep", "truncated"],
)
def test_a_file_that_is_no_safetensors_is_refused(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content == "truncated" else content)
    assert "model must have the weights that its config.json asks for, got" in why_not(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_what_to_do(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    assert (
        f"weights must be safetensors, as reading a pickle can run any code, got {name}: load it where you trust it "
        "and write it anew by model.save_pretrained(FOLDER)"
    ) in why_not(folder)


def test_no_weights_at_all_are_named(folder):
    (folder / "model.safetensors").unlink()
    assert "weights must be safetensors, got no file named model.safetensors" in why_not(folder)


def split(folder, files=("one.safetensors", "two.safetensors")):
    """The weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: files[at % 2] for at, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file, {"format": "pt"})
    change(folder / "model.safetensors.index.json", metadata={"total_size": 0}, weight_map=places)
    return places


def test_weights_in_several_files_are_loaded(folder, honest):
    split(folder)
    ours, theirs = (load_model(each, MODEL_TYPES)[0] for each in (folder, honest))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../elsewhere.safetensors", "weight_map of model.safetensors.index.json must name safetensors files of the"),
        ("pytorch_model.bin", "must name safetensors files of the folder, got 'pytorch_model.bin'"),
        ("none.safetensors", "must name safetensors files of the folder, got 'none.safetensors'"),
        (3, "must name safetensors files of the folder, got 3"),
    ],
)
def test_an_index_of_weights_names_files_of_the_folder(folder, file, message):
    places = split(folder)
    shutil.copy(folder / "one.safetensors", folder.parent / "elsewhere.safetensors")
    shutil.copy(folder / "one.safetensors", folder / "pytorch_model.bin")
    change(folder / "model.safetensors.index.json", weight_map=places | {NAME: file})
    assert message in why_not(folder)
    change(folder / "model.safetensors.index.json", weight_map=[file])
    assert "weight_map of model.safetensors.index.json must be a JSON object, got [" in why_not(folder)


WORD = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
TOKENIZERS = {
    "nothing": "",
    "a list": "[]",
    "deep": "[" * 10**5,
    "no model": {"model": {}},
    "a panic": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
    "panics as it merges": {
        "model": {
            "type": "BPE",
            "vocab": {"ab": 0, "a": 1, "b": 2},
            "merges": ["a b"],
            "continuing_subword_prefix": "ab",
        }
    },
    "beyond the model": {"model": WORD | {"vocab": {"<unk>": 0, "a": 97}}},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused(folder, kind):
    content = TOKENIZERS[kind]
    if isinstance(content, str):
        (folder / "tokenizer.json").write_text(content)
    else:
        change(folder / "tokenizer.json", **content)
    assert "model must have a tokenizer " in why_not(folder)


def test_a_tokenizer_that_fails_at_a_text_is_refused_there(folder):
    change(folder / "tokenizer.json", model=WORD, added_tokens=[])
    change(folder / "tokenizer_config.json", unk_token=...)
    _, tokenizer = load_model(folder, MODEL_TYPES)
    for read in (lambda: encode(tokenizer, "b"), lambda: load_tokens("b", tokenizer, 1)):
        with pytest.raises(
            UnusableInputError, match="model must have a tokenizer that reads the text: WordLevel error"
        ):
            read()
    assert opening(tokenizer) == []


def test_how_a_model_answers_is_not_for_its_config_to_say(folder, honest):
    change(folder / "config.json", use_cache=False, return_dict=False, output_hidden_states=True, torchscript=True)
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        ours, theirs = (load_model(each, MODEL_TYPES)[0](tokens) for each in (folder, honest))
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.past_key_values is not None
    assert ours.hidden_states is None


@pytest.mark.parametrize("make", [lambda: tiny_llama(tied=True), tiny_gemma], ids=["tied", "gemma"])
def test_a_model_without_tensors_that_it_need_not_have_is_loaded(folder, make):
    (model := make()).save_pretrained(folder)
    loaded, _ = load_model(folder, MODEL_TYPES)
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
