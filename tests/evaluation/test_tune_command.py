"""`kvcluster tune` as a user meets it: on a tiny local Llama, killed and started again, and when something is wrong."""

import json
import shlex
import struct
import subprocess
import sys

import pytest
import torch
from agreement import numbers_agree
from evaluation_inputs import character_tokenizer, save_character_llama, short_text
from families import MODELS, tiny
from rich.progress import Progress
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.evaluation.models import load_llama
from kvcluster.evaluation.runs import Runs
from kvcluster.evaluation.tuning import run as tuning
from kvcluster.fast.huggingface import whole_heads_of

SIZE = ["--tokens", 500, "--contexts", 2, "--threads", 1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_character_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(short_text())
    return path


def run(*arguments):
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_heads_are_printed_written_and_drawn(llama, text, tmp_path):
    made, drawn = tmp_path / "made.json", tmp_path / "made.png"
    done = run(llama, "--text", text, *SIZE, "--json", made, "--figure", drawn)
    assert done.exit_code == 0, done.output
    result = json.loads(made.read_text())
    assert sorted(result["heads"]) == [[layer, head] for layer in range(3) for head in range(2)]
    assert (result["layers"], len(result["contexts"])) == ([0, 1, 2], 2)
    for row, *rows in zip(result["shares"], *(each["shares"] for each in result["contexts"]), strict=True):
        assert all(0 <= share <= 1 for share in row)
        assert numbers_agree(row, [round(sum(shares) / 2, 6) for shares in zip(*rows, strict=True)])
    ordered = [result["shares"][layer][head] for layer, head in result["heads"]]
    assert ordered == sorted(ordered, reverse=True)
    for each in result["contexts"]:  # of 244 tokens of the body in 6 heads a quarter is above the threshold
        assert sum(round(244 * share) for row in each["shares"] for share in row) == 244 * 6 // 4
    assert run(*shlex.split(result["command"])[2:], "--json", tmp_path / "again.json").exit_code == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert {name for name in result if result[name] != again[name]} <= {"machine", "seconds"}
    layer, head = result["heads"][0]
    assert whole_heads_of(made, load_llama(llama)[0]) == [(layer, head)]
    assert f"│ {layer} │ {head} │ {ordered[0]:.3f} │ 16.7 │" in " ".join(done.output.split())
    assert png_size(drawn) > (600, 200)


def png_size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_a_killed_run_goes_on_with_the_next_context(llama, text, tmp_path, monkeypatch):
    given = [llama, "--text", text, *SIZE, "--json", tmp_path / "made.json"]
    read, whole = [], tuning.second_reading

    def killed_at_the_second(model, context, pieces, **options):
        read.append(context)
        if len(read) == 2:
            raise KeyboardInterrupt
        return whole(model, context, pieces, **options)

    monkeypatch.setattr(tuning, "second_reading", killed_at_the_second)
    CliRunner().invoke(app, ["tune", *map(str, given)])
    assert not (tmp_path / "made.json").exists()
    with (tmp_path / "made.runs.jsonl").open("a") as file:
        file.write('{"key": {"keep"')  # half a line
    assert run(*given).exit_code == 0
    assert read[1:] == [read[1]] * 2 != [read[0]] * 2
    assert run(*given).exit_code == 0
    assert len(read) == 3  # nothing is read again
    monkeypatch.undo()
    assert run(*given[:-1], tmp_path / "other.json").exit_code == 0
    made, other = (json.loads((tmp_path / name).read_text()) for name in ("made.json", "other.json"))
    assert (made["shares"], made["heads"]) == (other["shares"], other["heads"])


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if len(model[2]) < 4])
def test_every_family_is_tuned_at_the_layers_that_attend_to_everything(name):
    model, sliding = tiny(name)
    settings = tuning.Settings(name, None, n_contexts=2, n_tokens=300)
    with Progress(disable=True) as progress:
        result = tuning.tune(model, character_tokenizer(), short_text(), settings, Runs(), progress)
    assert result["layers"] == [layer for layer in range(4) if layer not in sliding]
    shares = torch.tensor(result["shares"])
    assert shares.shape == (len(result["layers"]), 2)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert sorted(result["heads"]) == [(layer, head) for layer in result["layers"] for head in range(2)]
    assert result["contexts"][0]["tokens"] != result["contexts"][1]["tokens"]


def test_input_that_cannot_be_used_is_refused(llama, text, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    local = [llama, "--text", text]
    for arguments, message in (
        ([tmp_path], "model must be a folder with a config.json"),
        ([llama, "--text", tmp_path / "bytes.txt"], "text must be a readable UTF-8 file"),
        ([*local, "--contexts", 99], "text must have at least"),
        ([*local, "--tokens", 256], "tokens must be more than 4 sinks and 252 recent ones, got 256"),
        ([*local, "--tokens", 4000], "tokens must leave room for 1,096 more within the model's 4,096 positions"),
        ([*local, "--json", tmp_path / "no" / "file"], "must be a file in an existing folder"),
        ([*local, "--figure", tmp_path / "no" / "file.png"], "figure must lie in an existing folder"),
        ([*local, "--figure", tmp_path / "file.txt"], "figure must end in one of"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, arguments
        assert message in " ".join(done.output.split())
        assert done.stderr.splitlines()[-1].startswith("kvcluster tune: ")


def test_without_torch_it_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['kvcluster', 'tune', 'smollm2']\n"
    code += "from kvcluster.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "kvcluster tune: torch is not installed: pip install 'kvcluster[hf]'\n"


def test_what_ships_is_what_was_measured():
    from benchmarks.tuning.run import RESULTS, SHIPPED, shipped

    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    assert SHIPPED.read_text() == shipped(results)
    results[0]["heads"].reverse()
    assert SHIPPED.read_text() != shipped(results)
