"""Files and folders that are not what a command asks for: one line on standard error, exit code 2, no traceback."""

import json
import os
from pathlib import Path

import pytest
from evaluation_inputs import save_character_llama, short_text
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.evaluation.demo import run as demo
from kvcluster.evaluation.demo.figure import draw
from kvcluster.evaluation.errors import UnusableInputError
from kvcluster.evaluation.places import check_file
from kvcluster.evaluation.runs import Runs
from kvcluster.theory.__main__ import app as theory

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "1" * 5_000
JUNK = bytes(range(256))
FULL = "/dev/full"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason=f"needs {FULL}")
SMALL = ["--tokens", 700, "--contexts", 1, "--threads", 1, "--method", "full", "--needles", 2]
LONGBENCH = {"input": "Who?", "context": "Ann went home. " * 20, "answers": ["Ann"], "all_classes": None}
RULER = {"input": "Ann went home. " * 20 + "\nQuestion: Who?", "outputs": ["Ann"]}
RUN = {"key": {"method": "full"}}
PROFILE = {"name": "tiny", "weights": {}, "layers": [0], "keeps": [0.5], "shares": [[[0.5]]], "heads": [[0, 0]]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_character_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def local(llama, tmp_path):
    (tmp_path / "text.txt").write_text(short_text())
    return ["--text", tmp_path / "text.txt"]


def refused(*arguments, command=app):
    """The line with which a command refuses."""
    result = CliRunner().invoke(command, [*map(str, arguments)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def put(path, content):
    """A file of bytes, of text or of JSON; a folder for None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


NO_JSON = {"deep": DEEP, "huge": HUGE, "empty": "", "junk": JUNK, "words": "none", "nan": "NaN", "folder": None}
NO_OBJECT = {"list": [1], "number": 7, "null": "null", "string": '"a"', "empty object": {}}


@pytest.mark.parametrize("name", [*NO_JSON, *NO_OBJECT])
@pytest.mark.parametrize("option", ["--longbench", "--ruler-files"])
def test_lines_that_are_no_objects_are_named(llama, local, tmp_path, option, name):
    path = put(tmp_path / "lines" / "hotpotqa.jsonl", (NO_JSON | NO_OBJECT)[name])
    line = refused("eval", "--model", llama, *local, *SMALL, "--tasks", "", option, tmp_path / "lines")
    assert line.startswith("kvcluster eval: ")
    assert str(path) in line


HALF = "\ud800"
WRONG_LINES = [
    ("--longbench", LONGBENCH, "input", [3, None, ["Who?"], HALF]),
    ("--longbench", LONGBENCH, "context", [3, None, {}, HALF]),
    ("--longbench", LONGBENCH, "answers", [3, "Ann", [], [3], [HALF], {"Ann": 1}]),
    ("--longbench", LONGBENCH, "all_classes", [3, "Ann", [None]]),
    ("--ruler-files", RULER, "input", [3, None, HALF]),
    ("--ruler-files", RULER, "outputs", [3, "Ann", [], [[]]]),
    ("--ruler-files", RULER, "answer_prefix", [3, None, HALF]),
]


@pytest.mark.parametrize(
    ("option", "right", "field", "value"),
    [(option, right, field, value) for option, right, field, values in WRONG_LINES for value in values],
)
def test_a_field_of_another_type_is_named_with_its_value(llama, local, tmp_path, option, right, field, value):
    path = put(tmp_path / "lines" / "hotpotqa.jsonl", json.dumps(right) + "\n" + json.dumps(right | {field: value}))
    small = [*SMALL, "--contexts", 2, "--tasks", ""]
    line = refused("eval", "--model", llama, *local, *small, option, tmp_path / "lines")
    assert line.startswith(f"kvcluster eval: {field} must be ")
    assert line.endswith(f"in {path}:2\n")
    assert "got " in line


@pytest.mark.parametrize(
    ("option", "line"),
    [("--longbench", LONGBENCH | {"context": ""}), ("--ruler-files", RULER | {"input": "\nQuestion: Who?"})],
)
def test_an_empty_context_is_named(llama, local, tmp_path, option, line):
    path = put(tmp_path / "lines" / "lcc.jsonl", line)
    said = refused("eval", "--model", llama, *local, *SMALL, "--tasks", "", option, tmp_path / "lines")
    assert said == f"kvcluster eval: context must have a token, got none in {path}:1\n"


@pytest.mark.parametrize("name", ["dataset2prompt.json", "config/dataset2maxlen.json"])
@pytest.mark.parametrize(
    "content",
    [DEEP, "", JUNK, [1], "7", {"hotpotqa": None}, {"hotpotqa": [3]}, {"hotpotqa": 1.5}, {"hotpotqa": True}],
    ids=["deep", "empty", "junk", "list", "number", "null", "list inside", "fraction", "true"],
)
def test_settings_of_longbench_are_named(llama, local, tmp_path, name, content):
    put(tmp_path / "lines" / "hotpotqa.jsonl", LONGBENCH)
    path = put(tmp_path / "lines" / name, content)
    line = refused("eval", "--model", llama, *local, *SMALL, "--tasks", "", "--longbench", tmp_path / "lines")
    assert str(path) in line


@pytest.mark.parametrize("name", [*NO_JSON, *NO_OBJECT, "no key", "a key that is none", "infinity"])
def test_earlier_runs_that_are_none_are_named(llama, local, tmp_path, name):
    others = {"no key": {"task": "needles"}, "a key that is none": {"key": 3}, "infinity": '{"key": {}, "nll": 1e999}'}
    content = (NO_JSON | NO_OBJECT | others)[name]
    if content is not None:
        content = content if isinstance(content, str | bytes) else json.dumps(content)
        content = f"{json.dumps(RUN)}\n".encode() + (content.encode() if isinstance(content, str) else content) + b"\n"
    path = put(tmp_path / "made.runs.jsonl", content)
    given = ["--model", llama, *local, *SMALL, "--tasks", "needles", "--json", tmp_path / "made.json"]
    assert f"{path}{'' if content is None else ':2'} must be " in refused("eval", *given)
    assert not (tmp_path / "made.json").exists()


@pytest.mark.parametrize("name", [*NO_JSON, *NO_OBJECT, "infinite layer", "text for numbers"])
def test_a_profile_that_is_none_is_named(llama, local, tmp_path, name):
    others = {
        "infinite layer": json.dumps(PROFILE).replace("[0]", "[1e999]"),
        "text for numbers": PROFILE | {"shares": "many"},
    }
    path = put(tmp_path / "profile.json", (NO_JSON | NO_OBJECT | others)[name])
    assert str(path) in refused("eval", "--model", llama, *local, *SMALL, "--profile", path)


def copied(llama, folder, name, content):
    """The model with one file in another's place, or with some fields of it changed."""
    for path in llama.iterdir():
        put(folder / path.name, path.read_bytes())
    if isinstance(content, dict):
        content = json.loads((llama / name).read_text()) | content
    (folder / name).unlink()
    put(folder / name, content)
    return folder


@pytest.mark.parametrize("command", [["eval", "--model"], ["tune"], ["demo", "--model"]], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("config.json", content) for content in (DEEP, JUNK, "7", {"num_hidden_layers": "three"})),
        *(("tokenizer.json", content) for content in (DEEP, "", JUNK, [1])),
        *(("model.safetensors", content) for content in (b"", JUNK, DEEP)),
    ],
)
def test_a_model_of_which_a_file_is_damaged_is_named(llama, local, tmp_path, command, name, content):
    folder = copied(llama, tmp_path / "model", name, content)
    line = refused(*command, folder, *local)
    assert line.startswith(f"kvcluster {command[0]}: model must ")
    assert str(folder) in line


def test_a_model_without_some_of_its_weights_is_not_filled_up_at_random(llama, local, tmp_path):
    folder = copied(llama, tmp_path / "model", "config.json", {"num_hidden_layers": 4})
    line = refused("eval", "--model", folder, *local)
    assert f"got {folder}" in line
    assert "model.layers.3." in line


TEXTS = {"folder": None, "junk": JUNK, "empty": "", "short": "a"}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("command", [["eval", "--model"], ["tune"], ["demo", "--model"]], ids=lambda words: words[0])
def test_a_text_that_is_none_is_refused(llama, tmp_path, command, name):
    text = put(tmp_path / "text.txt", TEXTS[name])
    assert "text must " in refused(*command, llama, "--text", text, "--tokens", 600)


def places(tmp_path):
    """Where no file can be written."""
    put(tmp_path / "file", "")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    return [tmp_path / "folder", tmp_path / "file" / "x", tmp_path / "none" / "x", "/proc/x", tmp_path / "circle"]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("eval", "--json"),
        ("tune", "--json"),
        ("bench", "--json"),
        ("check", "--json"),
        ("check", "--junit"),
        ("tune", "--figure"),
        ("demo", "--figure"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch, command, option, number):
    monkeypatch.setattr("kvcluster.evaluation.models.load_folder", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("kvcluster.conformance.commands.loaded", lambda _: pytest.fail("a module was loaded"))
    place = f"{places(tmp_path)[number]}{'.png' * (option == '--figure' and number in (1, 2, 3))}"
    given = {"tune": [tmp_path], "check": ["kvcluster.reference"]}.get(command, [])
    assert place in refused(command, *given, option, place)


@pytest.mark.parametrize("folder", ["file", "none", "/proc/self/fdinfo"])
@pytest.mark.parametrize("command", ["eval", "bench", "theory"])
def test_figures_need_a_folder_that_can_be_written_to(tmp_path, command, folder):
    put(tmp_path / "file", "")
    words = [] if command == "theory" else [command]
    line = refused(*words, "--figures", tmp_path / folder, command=theory if command == "theory" else app)
    assert line.startswith(f"kvcluster {command}: {tmp_path / folder} ")


def test_looking_at_a_place_leaves_it_as_it_was(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    put(tmp_path / "there", "kept")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a reader
    for name in ("link", "target", "there", "new", "pipe"):
        check_file(tmp_path / name)
    assert (tmp_path / "there").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "there", "pipe"}


@needs_full
@pytest.mark.parametrize("option", ["--json", "--figure"])
def test_a_full_disk_is_said_with_the_file(llama, local, tmp_path, option):
    place = tmp_path / "made.png"
    place.symlink_to(FULL)
    given = ["--tokens", 500, "--contexts", 1, "--threads", 1, "--rule", "reading", "--no-bits", option, place]
    line = refused("tune", llama, *local, *given)
    assert line == f"kvcluster tune: {place} cannot be written: No space left on device\n"


@needs_full
def test_runs_on_a_full_disk_are_said_with_their_file(tmp_path):
    runs = Runs(tmp_path / "made.runs.jsonl")
    runs.path = Path(FULL)
    with pytest.raises(UnusableInputError, match=f"^{FULL} cannot be written: No space left on device$"):
        runs.add(RUN)


@pytest.mark.parametrize("tokens", ["", "0", "-5", "700,0"])
def test_lengths_that_are_none_are_refused(llama, local, tokens):
    assert "tokens must be whole numbers of at least 1" in refused("eval", "--model", llama, *local, "--tokens", tokens)


@pytest.mark.parametrize("name", [*NO_JSON, *NO_OBJECT, "names that are lists"])
def test_a_manifest_that_is_none_is_refused(tmp_path, name):
    whole = {"format": "kvcluster vectors", "arithmetic_contract": 1, "seed": 0, "files": {}}
    other = whole | {"cases": [{"operation": [], "name": []}]}
    put(tmp_path / "vectors" / "manifest.json", (NO_JSON | NO_OBJECT | {"names that are lists": other})[name])
    assert "manifest.json" in refused("vectors", "--verify", tmp_path / "vectors")
    assert f"got {tmp_path / 'vectors'}" in refused("vectors", tmp_path / "vectors")


@pytest.mark.parametrize("parent", ["file", "/proc"])
def test_vectors_go_nowhere_where_no_folder_can_be_made(tmp_path, parent):
    put(tmp_path / "file", "")
    assert refused("vectors", tmp_path / parent / "new").startswith("kvcluster vectors: ")


@pytest.mark.parametrize(
    "content", [None, JUNK, "x = " + "(" * 500, "raise SystemExit(0)", "import nothing_like_it", ""]
)
def test_an_adapter_that_is_none_is_refused(tmp_path, content):
    path = put(tmp_path / "adapter.py", content)
    assert refused("check", path).startswith(f"kvcluster check: {path} cannot be loaded: ")


def test_an_operation_that_ends_the_process_cannot_be_checked(tmp_path):
    path = put(tmp_path / "adapter.py", "import sys\n\ndef similarity(a, b):\n    sys.exit(0)\n")
    result = CliRunner().invoke(app, ["check", str(path)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "sys.exit(0)" in result.stderr


def test_a_name_may_look_like_markup(tmp_path):
    path = tmp_path / "[" / "bold].py"
    path.parent.mkdir()
    assert CliRunner().invoke(app, ["check", "--scaffold", str(path)]).exit_code == 0
    path.write_text("def alternating_partition(size):\n    return 1, 2\n")
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 1, result.exception
    assert "[/bold].pyagainstthereference" in "".join(result.output.split())


def test_names_and_words_may_look_like_formulas(llama, local, tmp_path, monkeypatch):
    odd = tmp_path / "$\\x$"
    odd.symlink_to(llama)
    drawn = [tmp_path / "tuned.png", tmp_path / "shown.png"]
    monkeypatch.setattr(demo, "draw", lambda *given: draw(*given[:-1], ["$\\x$"] * len(given[-1])))
    for command, path in (
        (["tune", odd, "--contexts", 1, "--rule", "reading", "--no-bits"], drawn[0]),
        (["demo", "--model", odd], drawn[1]),
    ):
        given = [*command, *local, "--tokens", 600, "--figure", path]
        result = CliRunner().invoke(app, [*map(str, given)])
        assert (result.exit_code, result.stderr) == (0, ""), result.exception
    assert all(path.stat().st_size > 10_000 for path in drawn)
