"""Which bits `kvcluster tune` finds at a share of the bytes, and that `bytes_ratio` takes them."""

import dataclasses
import json
import math
import re

import pytest
from evaluation_inputs import save_character_llama, short_text
from models import tiny_llama
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.evaluation.models import load_llama
from kvcluster.evaluation.tuning import bits, losses
from kvcluster.fast.huggingface import ClusteredCache, Profile
from kvcluster.fast.huggingface.bytes_ratio import BITS, chosen_for_bytes, share_of_bytes


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_character_llama(tmp_path_factory.mktemp("llama"))


def tuned(llama, tmp_path, *arguments):
    text, made = tmp_path / "text.txt", tmp_path / "made.json"
    text.write_text(short_text())
    given = ["tune", llama, "--text", text, "--tokens", 500, "--contexts", 2, "--threads", 1, "--rule", "reading"]
    done = CliRunner().invoke(app, [*map(str, given), "--json", str(made), *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(made.read_text()), done.output


def test_the_bits_with_the_least_loss_are_found_and_taken(llama, tmp_path):
    result, output = tuned(llama, tmp_path)
    assert [at["bytes_ratio"] for at in result["bits"]] == list(bits.BYTES_RATIOS)
    of_contexts = [each["losses"] for each in result["contexts_bits"]]
    means = [round(math.fsum(of) / 2, 6) for of in zip(*of_contexts, strict=True)]
    assert [loss for at in result["bits"] for loss in at["losses"].values()] == means
    model, _ = load_llama(llama)
    profile = Profile.read(tmp_path / "made.json")
    for at in result["bits"]:
        assert at["losses"][str(at["bits"])] == min(at["losses"].values())
        cache = ClusteredCache.for_model(model, bytes_ratio=at["bytes_ratio"] / 2, profile=profile)  # of float32
        taken = cache.parameters["bits"]
        assert taken >= at["bits"]  # more where all tokens fit
        assert profile.bits_at(at["bytes_ratio"]) == at["bits"]
    assert "What is lost at equal bytes" in output
    for at in result["bits"]:
        row = re.search(rf"│\s*{at['bytes_ratio']:g} │.*│\s*(\d) │", output)
        assert row is not None
        assert int(row[1]) == at["bits"]


def test_nothing_is_measured_again_and_bits_can_be_left_out(llama, tmp_path, monkeypatch):
    first, _ = tuned(llama, tmp_path)
    monkeypatch.setattr(losses, "loss_of", None)
    again, _ = tuned(llama, tmp_path)
    assert again["bits"] == first["bits"]
    without, output = tuned(llama, tmp_path, "--no-bits")
    assert "bits" not in without
    assert "--no-bits" in without["command"]
    assert "What is lost at equal bytes" not in output
    assert Profile.read(tmp_path / "made.json").bits is None


def test_the_candidates_take_the_same_bytes():
    for ratio in bits.BYTES_RATIOS:
        found = list(bits.candidates(ratio, 64))
        assert [number for number, _ in found] == list(BITS[: len(found)])
        for number, kept in found[:-1]:
            assert kept == ratio / share_of_bytes(number, 64, 2)
            assert kept < 1


def test_the_nearest_measured_bytes_decide():
    even = {"layers": (0,), "keeps": (0.5,), "shares": (((0.5,),),), "heads": ((0, 0),)}
    profile = Profile("a model", {}, **even, bits=((0.04, 2), (0.1, 3), (0.4, 4)))
    profile.check()
    config = tiny_llama(head_dim=64).config
    expected_at = {0.01: 2, 0.06: 2, 0.07: 3, 0.19: 3, 0.21: 4, 0.33: 4, 0.57: 4, 0.58: 8, 0.9: 8}
    for ratio, expected in expected_at.items():
        kept, found = chosen_for_bytes(ratio, config, 2, profile)
        assert found == expected
        assert kept == min(1.0, ratio / share_of_bytes(found, 64, 2))
    for wrong, message in (
        (((0.1, 3), (0.1, 4)), "bytes_ratio must ascend"),
        (((0.1, 3), (1.5, 4)), "bytes_ratio must ascend"),
        (((0.1, 5),), "bits must be of"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(profile, bits=wrong).check()
