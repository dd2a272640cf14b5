"""`kvcluster demo` as a user meets it: on a tiny local Llama, and when something is wrong."""

import json

import pytest
import torch
from models import random_tokens, save_llama, tiny_gemma, tiny_llama
from rich.progress import Progress
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.evaluation.demo import oracle
from kvcluster.evaluation.demo import run as demo_run
from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.huggingface.entry_layer import ClusteredLayer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    numbers = torch.randint(1, 97, (1000,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(f"w{number}" for number in numbers.tolist()))
    return path


def run(*arguments):
    result = CliRunner().invoke(app, ["demo", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_demo_compares_and_draws(llama, text, tmp_path):
    figure = tmp_path / "figure.png"
    result = run("--model", llama, "--text", text, "--tokens", 400, "--figure", figure)
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    for expected in ("entries per head", "bytes of the", "ms per token", "perplexity of the", "continuation"):
        assert expected in printed
    assert "0 assignments and 0 stored bytes differ" in printed
    assert "They agree." in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_demo_of_a_short_context_says_that_nothing_is_clustered(llama, text, tmp_path):
    result = run("--model", llama, "--text", text, "--tokens", 80, "--figure", tmp_path / "figure.png")
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    assert "0 clustered tokens compared" in printed
    assert "nothing was clustered" in printed


def test_the_demo_fails_when_the_fast_path_errs(llama, text, tmp_path, monkeypatch):
    """The line of truth can be bad news: labels of another chunk size are found out."""
    right = oracle.fast.chunked_soft_matching
    monkeypatch.setattr(
        oracle.fast, "chunked_soft_matching", lambda keys, **_: right(keys, keep_ratio=0.5, chunk_size=32)
    )
    result = run("--model", llama, "--text", text, "--tokens", 400, "--figure", tmp_path / "figure.png")
    assert result.exit_code == 1
    assert "THEY DISAGREE" in result.output


def test_the_demo_fails_when_one_stored_bit_is_wrong(llama, text, tmp_path, monkeypatch):
    right = demo_run.check_against_reference

    def with_one_bit_flipped(full, clustered, attention, progress):
        clustered.layers[1].cache.caches[0].values.view(torch.int32)[0, 1, 50, 3] ^= 1
        return right(full, clustered, attention, progress)

    monkeypatch.setattr(demo_run, "check_against_reference", with_one_bit_flipped)
    result = run("--model", llama, "--text", text, "--tokens", 400, "--figure", tmp_path / "figure.png")
    assert result.exit_code == 1
    assert "0 assignments and 1 stored bytes differ" in " ".join(result.output.split())
    assert "THEY DISAGREE" in result.output


def test_the_demo_fails_when_attention_misses_the_log_counts(llama, text, tmp_path, monkeypatch):
    right = ClusteredLayer.attend

    def without_counts(layer, query, *, scale):
        layer.cache.caches[0].counts[:] = 1  # of the copy that the oracle listens to
        return right(layer, query, scale=scale)

    monkeypatch.setattr(ClusteredLayer, "attend", without_counts)
    result = run("--model", llama, "--text", text, "--tokens", 400, "--figure", tmp_path / "figure.png")
    assert result.exit_code == 1
    assert "0 assignments and 0 stored bytes differ" in " ".join(result.output.split())
    assert "THEY DISAGREE" in result.output


def measured(keep_ratio, model=None):
    """Full and clustered cache of 400 random tokens, measured."""
    model = tiny_llama() if model is None else model
    context, following = random_tokens(400 + demo_run.N_NEXT).split([400, demo_run.N_NEXT], dim=1)
    with Progress(disable=True) as progress, torch.inference_mode():
        return demo_run.measure(model, context, following, keep_ratio=keep_ratio, chunk_size=64, progress=progress)


def test_the_clustered_cache_is_that_of_a_model_that_read_the_context():
    """Also where layers slide."""
    model = tiny_gemma()
    _, clustered = measured(0.25, model)
    sizes = {"keep_ratio": 0.25, "chunk_size": 64, "n_sink": 16, "n_recent": 64}
    cache = ClusteredCache.for_model(model, method=SoftMatching(), **sizes)
    with torch.inference_mode():
        model(random_tokens(400 + demo_run.N_NEXT)[:, :400], past_key_values=cache)
    assert clustered.entries == cache.n_stored < 400
    for ours, theirs in zip(clustered.cache.layers, cache.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_what_is_measured_is_each_cache_itself():
    full, clustered = measured(0.25)
    assert clustered.entries < full.entries == 400
    assert clustered.nbytes < full.nbytes
    assert clustered.perplexity != full.perplexity
    assert clustered.continuation != full.continuation
    assert len(clustered.continuation) == len(full.continuation) == 1 + len(full.seconds)
    assert full.cache.get_seq_length() == clustered.cache.n_seen == 400  # both as they were


def test_keep_ratio_one_measures_the_full_cache_twice():
    full, clustered = measured(1)
    assert clustered.entries == full.entries
    assert clustered.perplexity == full.perplexity
    assert clustered.continuation == full.continuation


def test_clustering_goes_on_while_perplexity_is_measured(monkeypatch):
    """Fed all at once, the tokens would attend to each other as they are."""
    stepwise = measured(0.25)
    monkeypatch.setattr(demo_run, "N_FED", demo_run.N_NEXT)
    at_once = measured(0.25)
    changes = [abs(a.perplexity / b.perplexity - 1) for a, b in zip(stepwise, at_once, strict=True)]
    assert changes[1] > changes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-ratio", "0"], "keep_ratio must be in (0, 1], got 0.0"),
        (["--keep-ratio", "1.5"], "keep_ratio must be in (0, 1], got 1.5"),
        (["--chunk-size", "0"], "chunk_size must be at least 1, got 0"),
        (["--tokens", "5"], "tokens must be at least 64, got 5"),
        (["--tokens", "500"], "text must have at least 1012 tokens, got 1000"),
        (["--tokens", "488"], None),
        (["--text", "nowhere.txt"], "text must be a readable UTF-8 file, got nowhere.txt"),
        (["--model", "nowhere"], "model must be a folder with a config.json, got nowhere"),
        (["--figure", "nowhere/figure.png"], "figure must lie in an existing folder, got nowhere/figure.png"),
        (["--figure", "figure.xyz"], "svgz .tif .tiff .webp, got figure.xyz"),
        (["--figure", "figure"], "figure must end in one of .avif .eps"),
        (["--figure", "."], "figure must be a file, got the folder ."),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_two(llama, text, tmp_path, arguments, message):
    defaults = {"--model": llama, "--text": text, "--tokens": 400, "--figure": tmp_path / "figure.png"}
    given = defaults | dict(zip(arguments[::2], arguments[1::2], strict=True))
    result = run(*(part for pair in given.items() for part in pair))
    if message is None:
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 2
    assert result.stderr.startswith("kvcluster demo: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--keep-ratio", "0"],
        ["--chunk-size", "0"],
        ["--tokens", "5"],
        ["--figure", "figure.xyz"],
        ["--text", "nowhere.txt"],
    ],
)
def test_what_is_cheap_to_check_is_checked_before_the_model_is_loaded(monkeypatch, arguments):
    monkeypatch.setattr(demo_run, "load_model", lambda folder: pytest.fail("the model was loaded"))
    assert run(*arguments).exit_code == 2


def test_a_context_longer_than_the_model_knows_is_refused(llama, text):
    result = run("--model", llama, "--text", text, "--tokens", 600)
    assert result.exit_code == 2
    assert "tokens must be at most 512 for this model, got 600" in result.stderr


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def damage(folder, kind):
    """Make the model in `folder` unusable."""
    weights = folder / "model.safetensors"
    if kind == "garbage":
        weights.write_bytes(b"no weights")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "other shapes":
        change_config(folder, intermediate_size=80)
    elif kind == "sliding":
        change_config(folder, model_type="mistral", sliding_window=64)
    elif kind == "short":
        change_config(folder, max_position_embeddings=500)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("garbage", "model must have the weights that its config.json asks for, got"),
        ("truncated", "model must have the weights that its config.json asks for, got"),
        ("other shapes", "model must have the weights that its config.json asks for, got"),
        ("no weights", "no file named model.safetensors"),
        ("sliding", "model must have a layer that attends to everything, got one whose layers all slide"),
        ("short", "model must know at least 576 positions (max_position_embeddings), got one that knows 500"),
    ],
)
def test_an_unusable_model_is_one_clear_line_and_exit_code_two(tmp_path, text, kind, message):
    damage(save_llama(tmp_path), kind)
    result = run("--model", tmp_path, "--text", text)
    assert result.exit_code == 2
    assert result.stderr.startswith("kvcluster demo: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_text_that_is_not_utf8_is_refused(llama, tmp_path):
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9")
    result = run("--model", llama, "--text", text)
    assert result.exit_code == 2
    assert "text must be a readable UTF-8 file" in result.stderr


@pytest.mark.parametrize("model_type", ["gpt2", "no-such-model"])
def test_another_type_of_model_is_refused(tmp_path, model_type):
    result = run("--model", save_llama(tmp_path, model_type=model_type))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert model_type in result.stderr
