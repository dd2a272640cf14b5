"""`kvcluster tune` as a user meets it: on a tiny local Llama, killed and started again, and when something is wrong."""

import json
import shlex
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from agreement import at_most_in_float64
from evaluation_inputs import character_tokenizer, save_character_llama, short_text
from families import MODELS, tiny
from rich.progress import Progress
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.evaluation.models import load_llama
from kvcluster.evaluation.pages import fill
from kvcluster.evaluation.runs import Runs
from kvcluster.evaluation.tuning import losses, rules, run
from kvcluster.evaluation.tuning.direct import PARTS, RATIO, best_shares, only_whole, order_by_worth
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, Profile, whole_heads_of

SIZE = ["--tokens", 500, "--contexts", 2, "--threads", 1, "--no-bits"]  # which are in test_tune_bits.py
READING = [*SIZE, "--rule", "reading"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_character_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(short_text())
    return path


def tuned(*arguments):
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_shares_are_printed_written_and_drawn(llama, text, tmp_path):
    made, drawn = tmp_path / "made.json", tmp_path / "made.png"
    done = tuned(llama, "--text", text, *READING, "--json", made, "--figure", drawn)
    assert done.exit_code == 0, done.output
    result = json.loads(made.read_text())
    assert sorted(result["heads"]) == [[layer, head] for layer in range(3) for head in range(2)]
    assert (result["rule"], result["layers"], len(result["contexts"])) == ("reading", [0, 1, 2], 2)
    shares, alone = np.array(result["shares"]), np.array([each["shares"] for each in result["contexts"]])
    assert shares.shape == (len(result["keeps"]), 3, 2)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert shares.ravel().tolist() == [round(share, 6) for share in alone.mean(axis=0).ravel().tolist()]
    at_quarter = shares[result["keeps"].index(0.25)]
    ordered = [at_quarter[layer][head] for layer, head in result["heads"]]
    assert ordered == sorted(ordered, reverse=True)
    for of_keep, keep in zip(alone.transpose(1, 0, 2, 3), result["keeps"], strict=True):
        for of_context in of_keep:  # of 244 tokens of the body in 6 heads so many are above the threshold
            assert np.rint(244 * of_context).sum() == int(keep * 244 * 6)
    assert tuned(*shlex.split(result["command"])[2:], "--json", tmp_path / "again.json").exit_code == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert {name for name in result if result[name] != again[name]} <= {"machine", "seconds"}
    layer, head = result["heads"][0]
    model = load_llama(llama)[0]
    assert whole_heads_of(made, model) == [(layer, head)]
    assert ClusteredCache.for_model(model, keep_ratio=0.3, profile=made).n_seen == 0
    assert f"│ {layer} │ {head} │ {ordered[0]:.3f} │ 16.7 │" in " ".join(done.output.split())
    assert png_size(drawn) > (600, 200)


def test_few_heads_are_compressed_one_by_one(llama, text, tmp_path):
    made, drawn = tmp_path / "made.json", tmp_path / "made.png"
    done = tuned(llama, "--text", text, *SIZE, "--json", made, "--figure", drawn)
    assert done.exit_code == 0, done.output
    result = json.loads(made.read_text())
    assert (result["rule"], result["parts"]) == ("direct", list(PARTS))
    losses, alone = np.array(result["losses"]), np.array([each["losses"] for each in result["contexts"]])
    assert losses.shape == (3, 2, len(PARTS))
    assert losses.ravel().tolist() == [round(loss, 6) for loss in alone.mean(axis=0).ravel().tolist()]
    whole, alone = np.array(result["losses_whole"]), np.array([each["losses_whole"] for each in result["contexts"]])
    assert whole.ravel().tolist() == [round(loss, 6) for loss in alone.mean(axis=0).tolist()]
    in_order = [whole[layer, head] for layer, head in result["heads"]]
    assert in_order == sorted(in_order)
    assert len(set(in_order)) > 1
    for keep, shares in zip(result["keeps"], result["shares"], strict=True):
        assert round(100 * np.sum(shares)) == round(100 * 6 * keep)  # hundredths of a head
    assert Profile.read(made).keep_ratios(0.25, chunk_size=256, n_layers=3)
    assert "What is lost when one head alone keeps a part" in done.output
    assert png_size(drawn) > (600, 200)


def png_size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.mark.parametrize(("rule", "part"), [("reading", (rules, "second_reading")), ("direct", (losses, "loss_of"))])
def test_a_killed_run_goes_on_where_it_stopped(llama, text, tmp_path, monkeypatch, rule, part):
    given = [llama, "--text", text, *SIZE, "--rule", rule, "--json", tmp_path / "made.json"]
    calls, whole = [], getattr(*part)

    def killed_at_the_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(*part, killed_at_the_second)
    CliRunner().invoke(app, ["tune", *map(str, given)])
    assert not (tmp_path / "made.json").exists()
    with (tmp_path / "made.runs.jsonl").open("a") as file:
        file.write('{"key": {"keep"')  # half a line
    assert tuned(*given).exit_code == 0
    n_calls = len(calls)
    assert n_calls == 1 + (2 if rule == "reading" else 2 * (1 + 6 * (len(PARTS) + 1)))  # the killed one is made again
    assert tuned(*given).exit_code == 0
    assert len(calls) == n_calls  # nothing is measured again
    monkeypatch.undo()
    assert tuned(*given[:-1], tmp_path / "other.json").exit_code == 0
    made, other = (json.loads((tmp_path / name).read_text()) for name in ("made.json", "other.json"))
    assert (made["shares"], made["heads"]) == (other["shares"], other["heads"])


@pytest.mark.parametrize("rule", ["reading", "direct"])
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if len(model[2]) < 4])
def test_every_family_is_tuned_at_the_layers_that_attend_to_everything(name, rule):
    model, sliding = tiny(name)
    settings = run.Settings(name, None, n_contexts=2, n_tokens=300, rule=rule, with_bits=False)
    with Progress(disable=True) as progress:
        result = run.tune(model, character_tokenizer(), short_text(), settings, Runs(), progress)
    assert result["layers"] == [layer for layer in range(4) if layer not in sliding]
    profile = Profile.of(json.loads(json.dumps(result)))
    profile.check_model(model)
    assert np.array(profile.shares).shape == (len(profile.keeps), len(profile.layers), 2)
    contexts = [each.get("tokens", each.get("case")) for each in result["contexts"]]
    assert contexts[0] != contexts[1]


def test_the_best_shares_are_those_of_every_way_to_share():
    """Three heads on a coarse grid, by brute force."""
    losses = np.array([[0.9, 0.2, 0.1], [0.5, 0.45, 0.4], [0.05, 0.06, 0.0]])
    parts = (0.1, 0.3, 0.6)

    def total(shares, curves=losses):
        known = np.maximum.accumulate(np.hstack([curves, np.zeros((3, 1))])[:, ::-1], axis=1)[:, ::-1]
        at, lost = [*parts, 1.0], 0.0
        for share, curve in zip(shares, known, strict=True):
            below = curve[0] + (curve[0] - curve[1]) / (at[1] - at[0]) * (at[0] - share)
            lost += below if share < at[0] else np.interp(share, at, curve)
        return lost

    for keep in (0.1, 0.25, 0.5, 0.9):
        found = best_shares(losses, parts, keep)
        assert round(100 * sum(found)) == round(300 * keep)
        steps = round(300 * keep)
        others = [(a, b, steps - a - b) for a in range(101) for b in range(101) if 0 <= steps - a - b <= 100]
        best = min(total(np.array(shares) / 100) for shares in others)
        assert at_most_in_float64(total(found), best)
        assert total([keep] * 3) > best  # the wrong twin: all alike


def test_the_parts_of_the_direct_rule_can_be_chosen(llama, text, tmp_path):
    made = tmp_path / "made.json"
    given = [llama, "--text", text, "--tokens", 500, "--contexts", 1, "--threads", 1, "--no-bits"]
    assert tuned(*given, "--parts", "0.3, 0.6", "--json", made).exit_code == 0
    chosen = json.loads(made.read_text())
    assert chosen["parts"] == [0.3, 0.6]
    assert np.array(chosen["losses"]).shape == (3, 2, 2)
    assert shlex.split(chosen["command"])[-3:] == ["--parts", "0.3,0.6", "--no-bits"]
    n_runs = len(Runs(made.with_suffix(".runs.jsonl")).all)
    assert n_runs == 1 + 6 * (2 + 1)
    assert tuned(*given, "--parts", "0.3,0.6,0.9", "--json", made).exit_code == 0
    assert json.loads(made.read_text())["losses_whole"] == chosen["losses_whole"]
    assert len(Runs(made.with_suffix(".runs.jsonl")).all) == n_runs + 6  # of the third part alone


def test_heads_are_ordered_by_what_is_lost_with_each_alone_whole():
    heads = [(5, 0), (11, 0), (17, 0), (17, 1)]
    assert order_by_worth(np.array([0.2, 0.1, 0.3, 0.1]), heads) == [(11, 0), (17, 1), (5, 0), (17, 0)]


def test_one_head_stays_whole_and_all_others_are_compressed_the_published_way(llama):
    model, _ = load_llama(llama)
    cache, published = only_whole(model, 1, 0), {"ratio": RATIO, "max_new_tokens": 0}
    expected = ChelseaCache.for_model(model, whole_heads=[(1, 0)], **published)
    assert cache.parameters == expected.parameters
    with torch.no_grad():
        model(torch.arange(1000)[None] % model.config.vocab_size, past_key_values=cache)
    means = [layer.cache.caches[0].mean_entries for layer in cache.layers]
    assert means == [200, (1000 + 200) / 2, 200]


def test_input_that_cannot_be_used_is_refused(llama, text, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    local = [llama, "--text", text]
    for arguments, message in (
        ([tmp_path], "model must be a folder with a config.json"),
        ([llama, "--text", tmp_path / "bytes.txt"], "text must be a readable UTF-8 file"),
        ([*local, "--contexts", 99], "text must have at least"),
        ([*local, "--tokens", 256], "tokens must be more than 4 sinks and 252 recent ones, got 256"),
        ([*local, "--rule", "best"], "rule must be auto, reading or direct, got 'best'"),
        ([*local, "--parts", "0.2,much"], "parts must be numbers, got 'much'"),
        ([*local, "--parts", "0.5,0.2"], "parts must be at least one number, ascending, in (0, 1), got [0.5, 0.2]"),
        ([*local, "--parts", "0.5,1"], "parts must be at least one number, ascending, in (0, 1), got [0.5, 1.0]"),
        ([*local, "--parts", ","], "parts must be at least one number, ascending, in (0, 1), got []"),
        ([*local, *READING, "--parts", "0.5"], "parts must be left out with the rule reading, got [0.5]"),
        (
            [*local, "--rule", "reading", "--tokens", 4000],
            "tokens must leave room for 1,096 more within the model's 4,096 positions",
        ),
        ([*local, "--json", tmp_path / "no" / "file"], "must be a file in an existing folder"),
        ([*local, "--figure", tmp_path / "no" / "file.png"], "figure must lie in an existing folder"),
        ([*local, "--figure", tmp_path / "file.txt"], "figure must end in one of"),
    ):
        done = tuned(*arguments)
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
    from benchmarks.tuning.run import PAGE, RESULTS, SHIPPED, bits_tables, shipped

    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    assert SHIPPED.read_text() == shipped(results)
    assert PAGE.read_text() == fill(PAGE.read_text(), bits_tables(results))
    [direct] = [result for result in results if result["rule"] == "direct"]
    heads = [(layer, head) for layer in direct["layers"] for head in range(len(direct["losses_whole"][0]))]
    assert order_by_worth(np.ravel(direct["losses_whole"]), heads) == [tuple(pair) for pair in direct["heads"]]
    results[0]["heads"].reverse()
    assert SHIPPED.read_text() != shipped(results)
