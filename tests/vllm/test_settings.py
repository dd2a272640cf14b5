"""What users ask of the plugin comes from outside: whatever it is, it is refused by a line that names it."""

import json
import re
from types import SimpleNamespace

import pytest

from kvcluster.fast.vllm.settings import Settings, settings_of

LONG = 10**5000
MANY = "an integer of at most 100 digits"
CIRCLE: list = []
CIRCLE.append(CIRCLE)


def asked(parameters):
    return settings_of(SimpleNamespace(additional_config={"kvcluster": parameters}))


def deep(value, depth):
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (deep(1, 10**5), "kvcluster must be nested at most 32 deep, got more at [0][0]"),
        ({"keep_ratio": CIRCLE}, "kvcluster must be nested at most 32 deep, got more at keep_ratio[0]"),
        ({"keep_ratio": 0.5, "method": {"name": deep(1, 40)}}, "nested at most 32 deep, got more at method.name[0]"),
        ({"keep_ratio": LONG}, f"keep_ratio of kvcluster must be {MANY}, got an integer of 16,610 bits"),
        ({"keep_ratio": 0.5, "chunk_size": -LONG}, f"chunk_size of kvcluster must be {MANY}, got an integer"),
        (
            {"keep_ratio": 0.5, "method": {"name": "distinctive", "n_shared": LONG}},
            f"method.n_shared of kvcluster must be {MANY}",
        ),
        ({"keep_ratio": float("nan")}, "keep_ratio of kvcluster must be a finite number, got nan"),
        ({"keep_ratio": float("inf")}, "keep_ratio of kvcluster must be a finite number, got inf"),
        ({"keep_ratio": "0.5"}, "kvcluster: keep_ratio must be a number, got '0.5'"),
        ({"keep_ratio": None}, "kvcluster: keep_ratio must be a number, got None"),
        ({"keep_ratio": 10**50}, "keep_ratio must be in (0, 1], got 1000"),
        ({"keep_ratio": 0.5, "chunk_size": 10**50}, f"chunk_size must be at most 2147483647, got {10**50}"),
        ({"keep_ratio": 0.5, "n_sink": 2**40}, "n_sink must be at most 2147483647, got 1099511627776"),
        ({"keep_ratio": 0.5, "n_recent": 1e3}, "kvcluster: n_recent must be an integer, got 1000.0"),
        ({"keep_ratio": 0.5, "n_recent": [64]}, "kvcluster: n_recent must be an integer, got [64]"),
        ({"keep_ratio": 0.5, "n_recent": None}, "kvcluster: n_recent must be an integer, got None"),
        ({"keep_ratio": 0.5, "n_shared": "4"}, "kvcluster: n_shared must be an integer, got '4'"),
        (
            {"keep_ratio": 0.5, "method": ["distinctive"]},
            "method must be one of soft_matching, distinctive, attended, got [",
        ),
        ({"keep_ratio": 0.5, "method": {"name": ["distinctive"]}}, "method must be one of soft_matching, distinctive"),
        ({"keep_ratio": 0.5, "method": {"name": "distinctive", "n_shared": {}}}, "n_shared must be an integer, got {}"),
        ({"keep_ratio": 0.5, "method": {"name": "\x1b[2J" * 1000}}, "attended, got '\\x1b[2J\\x1b[2J"),
        ({"keep_ratio": 0.5, "a" * 10**6: 1}, "got 'aaa"),
        ({"keep_ratio": 0.5, "profile": "x" * 10**6}, "profile must be absent in vLLM"),
        ("x" * 10**6, "kvcluster must be a mapping with keep_ratio"),
        (7, "kvcluster must be a mapping with keep_ratio"),
    ],
    ids=lambda value: re.sub(r"\W+", " ", value)[:50] if isinstance(value, str) else "asked",
)
def test_what_is_asked_is_refused_by_name(parameters, message):
    refusal = refused(lambda: asked(parameters))
    assert message in refusal


def refused(ask):
    """The line with which a wish is refused."""
    with pytest.raises(ValueError, match=r"\S") as error:
        ask()
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 600
    return line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**5, "KVCLUSTER_VLLM must be nested at most 32 deep"),
        ('{"keep_ratio": 1e400}', "keep_ratio of KVCLUSTER_VLLM must be a finite number, got 1e400"),
        ('{"keep_ratio": NaN}', "keep_ratio of KVCLUSTER_VLLM must be a finite number, got NaN"),
        ('{"keep_ratio": -Infinity}', "keep_ratio of KVCLUSTER_VLLM must be a finite number, got -Infinity"),
        (
            '{"keep_ratio": 0.5, "method": {"n_shared": %s}}' % ("9" * 5000),
            f"method.n_shared of KVCLUSTER_VLLM must be {MANY}, got 999",
        ),
        ("\x1b[2J" * 1000, "KVCLUSTER_VLLM must be JSON, got '\\x1b[2J"),
    ],
)
def test_text_of_the_environment_is_refused_by_the_key(monkeypatch, text, message):
    monkeypatch.setenv("KVCLUSTER_VLLM", text)
    assert message in refused(lambda: settings_of(SimpleNamespace(additional_config={})))


def test_what_can_be_done_is_taken_as_it_is(monkeypatch):
    parameters = {
        "keep_ratio": 0.25,
        "chunk_size": 128,
        "n_recent": 0,
        "method": {"name": "distinctive", "n_shared": 3},
    }
    monkeypatch.setenv("KVCLUSTER_VLLM", json.dumps(parameters))
    assert settings_of(SimpleNamespace(additional_config=None)) == asked(parameters) == Settings(**parameters)
    assert asked(parameters).rule(32).entries == 32


def test_more_sinks_than_tokens_are_no_more_pages():
    rule = Settings(0.25, chunk_size=128, n_sink=2**30).rule(32)
    assert rule.kept_pages(50, 0).tolist() == [0, 1]
    assert rule.most_pages(50) == 2
