"""`kvcluster eval` as a user meets it: on a tiny local Llama, twice, and when something is wrong."""

import json
import subprocess
import sys

import pytest
from evaluation_inputs import character_tokenizer, save_character_llama, short_text
from models import tiny_gemma
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.evaluation.quality import METHODS

SIZE = ["--tokens", "700,900", "--contexts", 2, "--needles", 4, "--following", 30]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_character_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(short_text())
    return path


def run(*arguments):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.slow
def test_needles_and_perplexity_are_measured_printed_written_and_drawn(llama, text, tmp_path):
    given = ["--model", llama, "--text", text, *SIZE, "--keep", "0.5,0.3", "--threads", 1]
    given += ["--tasks", "needles,perplexity,attention"]
    given += ["--json", tmp_path / "made.json", "--figures", tmp_path]
    first = run(*given)
    assert first.exit_code == 0, first.output
    made = json.loads((tmp_path / "made.json").read_text())
    assert [(each["method"], each["keep"]) for each in made["summaries"]] == [
        ("full", 1.0),
        ("chunked", 0.5),
        ("chunked", 0.3),
    ]
    for each in made["summaries"]:
        assert (each["n_contexts"], each["needles"]["n"], each["perplexity"]["n_tokens"]) == (4, 16, 120)
        assert each["keep"] - 0.05 < each["entries"] <= each["keep"]
        assert each["needles"]["token_accuracy"]["low"] <= each["needles"]["token_accuracy"]["value"]
        assert len(each["attention_errors"]) == 3
    errors = [sum(each["attention_errors"]) for each in made["summaries"]]
    assert 0 == errors[0] < errors[1] < errors[2]
    assert len((tmp_path / "made.runs.jsonl").read_text().splitlines()) == 12
    names = {"needles-full", "needles-chunked-0.5", "needles-chunked-0.3", "frontier", "attention-error"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert "chunked" in first.output

    runs = (tmp_path / "made.runs.jsonl").read_bytes()
    again = run(*given)
    assert again.output.splitlines()[-8:] == first.output.splitlines()[-8:]
    assert (tmp_path / "made.runs.jsonl").read_bytes() == runs  # nothing was run again
    assert json.loads((tmp_path / "made.json").read_text())["summaries"] == made["summaries"]


@pytest.mark.slow
def test_a_profile_shares_out_what_is_kept(llama, text, tmp_path):
    profile = tmp_path / "profile.json"
    sizes = ["--text", text, "--tokens", 1400, "--contexts", 1, "--threads", 1]
    tuned = CliRunner().invoke(app, ["tune", *map(str, [llama, *sizes, "--rule", "reading", "--json", profile])])
    assert tuned.exit_code == 0, tuned.output
    given = [
        "--model",
        llama,
        *sizes,
        "--needles",
        2,
        "--tasks",
        "needles",
        "--method",
        "distinctive,distinctive-heads",
    ]
    given += ["--keep", 0.4, "--json", tmp_path / "made.json"]
    done = run(*given, "--profile", profile)
    assert done.exit_code == 0, done.output
    runs = [json.loads(line) for line in (tmp_path / "made.runs.jsonl").read_text().splitlines()]
    assert ["profile" in each["key"] for each in runs] == [False, True]
    assert len(set(runs[0]["n_stored"])) == 1 < len(set(runs[1]["n_stored"]))  # layers
    assert sum(runs[1]["n_stored"]) <= 0.4 * 1400 * 3
    other = json.loads(profile.read_text())
    other["weights"] = {"float32": "0" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    for path, message in (
        (tmp_path / "other.json", "profile must be one that `kvcluster tune` made for model"),
        (tmp_path / "none.json", "profile must be a readable file, got"),
        (text, "path must be a file that `kvcluster tune --json` wrote"),
    ):
        refused = run(*given, "--profile", path)
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.split())
    without = run(*given)
    assert without.exit_code == 2
    assert "model must be one whose profile is known" in " ".join(without.output.split())


def test_questions_come_first_in_a_model_whose_layers_slide(text, tmp_path):
    tiny_gemma().save_pretrained(tmp_path / "gemma")
    character_tokenizer().save_pretrained(tmp_path / "gemma")
    given = ["--model", tmp_path / "gemma", "--text", text, "--tokens", 500, "--contexts", 1, "--needles", 2]
    given += ["--keep", 0.5, "--threads", 1, "--json", tmp_path / "made.json", "--figures", tmp_path]
    first = run(*given, "--question-first")
    assert first.exit_code == 0, first.output
    summaries = json.loads((tmp_path / "made.json").read_text())["summaries"]
    assert [each["is_question_first"] for each in summaries] == [True, True]
    assert 0.45 < summaries[1]["entries"] <= 0.5
    assert "question first" in first.output
    later = run(*given, "--tasks", "needles,attention")
    assert later.exit_code == 0, later.output
    full, clustered = json.loads((tmp_path / "made.json").read_text())["summaries"]
    assert [each["is_question_first"] for each in (full, clustered)] == [False, False]
    assert [error > 0 for error in clustered["attention_errors"]] == [False, True, False, True]
    assert len((tmp_path / "made.runs.jsonl").read_text().splitlines()) == 4
    drawn = {f"needles-{name}{end}" for name in ("full", "chunked-0.5") for end in ("", "-question-first")}
    assert {path.stem for path in tmp_path.glob("*.png")} == {*drawn, "attention-error", "frontier"}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["--question-first"]], ids=["later", "first"])
def test_tasks_and_files_are_answered_by_generation(llama, text, tmp_path, settings):
    line = {"input": "Who?", "context": "Ann went home. " * 20, "answers": ["Ann"], "all_classes": None}
    (tmp_path / "longbench").mkdir()
    (tmp_path / "longbench" / "hotpotqa.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "ruler").mkdir()
    given = {"input": "Ann went home. " * 20 + "\nQuestion: Who?", "outputs": ["Ann"]}
    (tmp_path / "ruler" / "vt.jsonl").write_text(json.dumps(given) + "\n")
    options = [
        "--longbench",
        tmp_path / "longbench",
        "--ruler-files",
        tmp_path / "ruler",
        "--json",
        tmp_path / "made.json",
    ]
    small = ["--tokens", 1800, "--contexts", 1, "--keep", 0.6, "--tasks", "ruler", "--threads", 1, "--stepwise"]
    result = run("--model", llama, "--text", text, *small, *options, *settings)
    assert result.exit_code == 0, result.output
    for name in ("ruler single", "ruler frequent words", "longbench hotpotqa", "ruler file vt", "match all", "F1"):
        assert name in " ".join(result.output.split())
    [full, chunked] = json.loads((tmp_path / "made.json").read_text())["summaries"]
    assert len(full["tasks"]) == len(chunked["tasks"]) == 9
    assert all(0 <= each["score"]["value"] <= 1 for each in full["tasks"].values())


def test_input_that_cannot_be_used_is_refused(llama, text, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    local = ["--model", llama, "--text", text]
    for arguments, message in (
        (["--method", "best"], "method must be of full, chunked, chelsea-0, distinctive"),
        (["--keep", "0"], "keep must be in (0, 1], got 0"),
        (["--keep", "half"], "keep must be numbers, got 'half'"),
        (["--tokens", "4k"], "tokens must be whole numbers, got '4k'"),
        (["--tasks", "needles,memory"], "tasks must be of needles, perplexity, attention, ruler, got memory"),
        (
            ["--question-first", "--tasks", "needles,perplexity,attention"],
            "tasks must have a question where it comes first, got perplexity, attention",
        ),
        (["--model", "gemma"], "model must be a folder with a config.json, got gemma"),
        (["--method", ""], f"method must be of {', '.join(METHODS)}, got none"),
        ([*local, "--tasks", ""], "there must be something to do, got no tasks and no files"),
        ([*local, "--tokens", "4000"], "within the model's 4,096 positions, got 4,000"),
        ([*local, "--contexts", "99"], "text must have at least"),
        ([*local, "--part", "test"], "which must be of tuning, reporting, got 'test'"),
        ([*local, "--keep", "0.01", "--tokens", "700"], "keep must leave an entry for each of 9 chunks"),
        (["--model", tmp_path], "model must be a folder with a config.json"),
        (["--text", tmp_path / "bytes.txt"], "text must be a readable UTF-8 file"),
        (["--json", tmp_path / "no" / "file"], "must be a file in an existing folder"),
        (["--figures", tmp_path / "no"], "must be a folder that exists"),
        (["--longbench", tmp_path / "no"], "must be a folder that exists"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert message in " ".join(result.output.split())
        assert result.stderr.splitlines()[-1].startswith("kvcluster eval: ")


def test_without_torch_it_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['kvcluster', 'eval']\n"
    code += "from kvcluster.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "kvcluster eval: torch is not installed: pip install 'kvcluster[hf]'\n"


def test_a_real_model_finds_needles_in_its_full_cache_and_loses_them_in_published_clusters(tmp_path, real_model):
    given = ["--model", real_model, "--tokens", 1024, "--contexts", 1, "--needles", 6, "--kinds", "digits"]
    given += ["--keep", 0.5, "--threads", 1]
    result = run(*given, "--tasks", "needles", "--json", tmp_path / "made.json")
    assert result.exit_code == 0, result.output
    full, chunked = json.loads((tmp_path / "made.json").read_text())["summaries"]
    assert full["needles"]["token_accuracy"]["value"] > 0.9
    assert chunked["needles"]["token_accuracy"]["value"] < 0.6
