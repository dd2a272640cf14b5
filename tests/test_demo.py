"""`kvcluster demo` as a user meets it: on a tiny local Llama, and when something is wrong."""

import pytest
import torch
from kvcluster.cli import app
from kvcluster.cli.demo import oracle
from models import save_llama
from typer.testing import CliRunner


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-ratio", "0"], "keep_ratio must be in (0, 1], got 0.0"),
        (["--keep-ratio", "1.5"], "keep_ratio must be in (0, 1], got 1.5"),
        (["--chunk-size", "0"], "chunk_size must be at least 1, got 0"),
        (["--tokens", "5"], "tokens must be at least 64, got 5"),
        (["--tokens", "900"], "text must have at least 1412 tokens, got 1000"),
        (["--tokens", "488"], None),
        (["--text", "nowhere.txt"], "text must be a readable UTF-8 file, got nowhere.txt"),
        (["--model", "nowhere"], "model must be a folder with a config.json, got nowhere"),
        (["--figure", "nowhere/figure.png"], "figure must lie in an existing folder, got nowhere/figure.png"),
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


def test_a_context_longer_than_the_model_knows_is_refused(llama, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("w1 " * 2000)
    result = run("--model", llama, "--text", text, "--tokens", 600)
    assert result.exit_code == 2
    assert "tokens must be at most 512 for this model, got 600" in result.stderr


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
