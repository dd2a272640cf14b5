"""A model's folder is not trusted: what is wrong with it is said in one line, soon, and nothing of it runs."""

import io
import os
import sys

import pytest
import torch
from hostile_folders import change, why_not
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.evaluation import model_folders
from kvcluster.evaluation.errors import UnusableInputError
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.texts import encode
from kvcluster.fast.huggingface.hooks import MODEL_TYPES

CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Own: pass\n"


@pytest.fixture
def answers(monkeypatch):
    """Standard input with an answer to whoever asks."""
    stdin = io.StringIO("y\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    return stdin


def test_an_honest_folder_is_loaded(honest):
    model, tokenizer = load_model(honest, MODEL_TYPES)
    assert model.config._attn_implementation == "sdpa"
    assert model.dtype == torch.float32
    assert tokenizer.decode(encode(tokenizer, "as it is")) == "as it is"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_of_the_folder_is_never_run_and_nobody_is_asked(folder, tmp_path, answers, file, model_type):
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "own.Own") | {"AutoTokenizer": ["own.Own"] * 2}
    change(folder / file, auto_map=classes)
    change(folder / "config.json", model_type=model_type)
    line = why_not(folder)
    if model_type == "llama":
        assert f"auto_map of {file} must be absent, as code of a folder is never run, got {{" in line
    assert not marker.exists()
    assert answers.read() == "y\n"


def test_transformers_is_told_so_too(folder, tmp_path, answers, monkeypatch):
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    monkeypatch.setattr(model_folders, "ABSENT", {})
    assert "contains custom code" in why_not(folder, ("own",))
    assert not marker.exists()
    assert answers.read() == "y\n"


@pytest.mark.parametrize("command", [["eval", "--tasks", "needles", "--model"], ["tune"], ["demo", "--model"]])
def test_commands_say_so_in_one_line_and_read_no_answer(folder, tmp_path, command):
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    result = CliRunner().invoke(app, [*command, str(folder)], input="y\n")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"kvcluster {command[0]}: ")
    assert not marker.exists()


HUB = "kernels-community/flash-attn3"
CONFIGS = {
    "attention of the hub": (
        {"_attn_implementation": HUB},
        f"_attn_implementation of config.json .* sdpa, got '{HUB}'",
    ),
    "the same, in today's word": ({"attn_implementation": HUB}, "attn_implementation of config.json must be absent or"),
    "the same, inside": ({"_attn_implementation_internal": {"": HUB}}, "_attn_implementation_internal of config.json"),
    "experts of the hub": ({"experts_implementation": HUB}, "experts_implementation of config.json must be absent or"),
    "eager": ({"attn_implementation": "eager"}, "must be absent or sdpa, got 'eager'"),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config of config.json must be absent, as weights are read as they are, got {'bits': 4",
    ),
    "compressed": ({"compression_config": {"format": "int"}}, "compression_config of config.json must be absent"),
    "a file elsewhere": ({"transformers_weights": "../../weights.bin"}, "transformers_weights of config.json must be"),
    "a model inside": ({"text_config": {"model_type": "llama"}}, "text_config of config.json must be absent"),
    "a method's name": ({"get_text_config": 3}, "config.json must hold values, no methods of its class, got 'get_text"),
    "10^9 layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers of .* from 1 to 1000, got 1000000000"),
    "layers as text": ({"num_hidden_layers": "3"}, "num_hidden_layers of config.json must be an integer, got '3'"),
    "layers as a list": ({"num_hidden_layers": [3]}, r"must be an integer, got \[3\]"),
    "true layers": ({"num_hidden_layers": True}, "num_hidden_layers of config.json must be an integer, got True"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads of config.json must be from 1 to .*, got 0"),
    "fewer heads than none": ({"num_key_value_heads": -2}, "num_key_value_heads of .* must be from 1 to .*, got -2"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_attention_heads .* multiple of num_key_value_heads"),
    "an odd dim": ({"head_dim": 15}, "head_dim of config.json must be even, got 15"),
    "a width without end": ({"hidden_size": 10**18}, "hidden_size of config.json must be from 1 to 1048576, got 10000"),
    "a large vocabulary": ({"vocab_size": 2**40}, "vocab_size of config.json must be from 1 to 1048576"),
    "a larger one than there is": ({"vocab_size": 2**20}, r"lm_head.weight must have shape \(1048576, 64\), got"),
    "no positions": ({"max_position_embeddings": 0}, "max_position_embeddings of config.json must be from 1 to"),
    "a window before itself": ({"sliding_window": -5}, "sliding_window of config.json must be from 1 to"),
    "NaN in rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_parameters.rope_"),
    "rope of old, endless": ({"rope_parameters": ..., "rope_theta": float("inf")}, "rope_theta of .* got Infinity"),
    "negative rope": ({"rope_parameters": {"rope_theta": -1e4}}, "rope_parameters.rope_theta .* above 0, got -10000"),
    "rope as text": ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta of config.json must be a number, got 'x'"),
    "a scale of zero": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}},
        "rope_parameters.factor of config.json must be above 0, got 0.0",
    ),
    "NaN in norms": ({"rms_norm_eps": float("nan")}, "rms_norm_eps of config.json must be a finite number, got NaN"),
    "negative norms": ({"rms_norm_eps": -1.0}, "rms_norm_eps of config.json must be above 0, got -1.0"),
    "an activation of nowhere": ({"hidden_act": "\x1b[31m"}, "model must be a folder that can be loaded, got"),
    "a type that is a list": ({"model_type": ["llama"]}, r"model_type of config.json must be a name, got \['llama'\]"),
    "a type like a line": (
        {"model_type": "x\n\x1b[2J"},
        r"model_type of config.json must be a name, got 'x\\n\\x1b\[2J'",
    ),
    "no type": ({"model_type": ...}, "model_type of config.json must be a name, got None"),
    "a layer less": ({"num_hidden_layers": 2}, r"must not have model\.layers\.2\."),
    "a layer more": ({"num_hidden_layers": 4}, r"must have model\.layers\.3\."),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_is_refused_by_the_field(folder, monkeypatch, kind):
    changes, message = CONFIGS[kind]
    change(folder / "config.json", **changes)
    empty = torch.empty

    def bounded(*size, **options):
        made = empty(*size, **options)
        assert made.device.type == "meta" or made.numel() < 10**6
        return made

    monkeypatch.setattr(torch, "empty", bounded)
    with pytest.raises(UnusableInputError, match=message):
        load_model(folder, MODEL_TYPES)
    why_not(folder)


TEXTS = {
    "deep": ('{"a":' * 10**5 + "1" + "}" * 10**5, "config.json must be nested at most"),
    "less deep": ('{"a":' * 90 + "1" + "}" * 90, "config.json must be nested at most 32 deep, got more at a.a."),
    "a list": ("[]", r"config.json must be a JSON object, got \[\]"),
    "nothing": ("", "config.json must be JSON, got "),
    "no text": ("\x00\x1b", "config.json must be JSON, got "),
    "a huge number": (
        '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}",
        "vocab_size of config.json must be an",
    ),
    "beyond floats": ('{"model_type": "llama", "rms_norm_eps": 1e400}', "rms_norm_eps of .* finite number, got 1e400"),
}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_file_that_is_no_plain_json_is_refused(folder, file, kind):
    text, message = TEXTS[kind]
    (folder / file).write_text(text)
    with pytest.raises(UnusableInputError, match=message.replace("config.json", file)):
        load_model(folder, MODEL_TYPES)
    why_not(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_files_that_would_lead_elsewhere_are_refused(folder, name):
    (folder / name).write_text("{}")
    assert f"it must hold a whole model and nothing else, got '{name}'" in why_not(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"it must hold plain files, got '{name}'" in why_not(folder)


@pytest.mark.parametrize("what", ["empty", "file", "none", "config is a folder"])
def test_a_folder_without_a_config_is_refused(tmp_path, what):
    path = tmp_path / "model"
    if what == "file":
        path.write_text("{}")
    elif what == "config is a folder":
        (path / "config.json").mkdir(parents=True)
    elif what == "empty":
        path.mkdir()
    assert "model must be a folder with a config.json, got " in why_not(path)
