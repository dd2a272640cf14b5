"""A profile is a file that anybody may have written: what is wrong with it is one `ValueError` that names the key."""

import json
import os

import pytest
from models import tiny_llama

from kvcluster.fast.huggingface import ClusteredCache, Profile, whole_heads_of
from kvcluster.fast.huggingface.fingerprints import weights_digest

HEADS = [[2, 1], [0, 0], [1, 1], [2, 0], [1, 0], [0, 1]]
SHARES = [[[0.1, 0.05], [0.1, 0.1], [0.05, 0.2]], [[0.5, 0.3], [0.4, 0.6], [0.2, 1.0]]]
LONG = "9" * 5000
MODEL = tiny_llama()


@pytest.fixture
def honest():
    result = {"name": "tiny", "weights": {"float32": weights_digest(MODEL)}, "layers": [0, 1, 2]}
    result |= {"keeps": [0.1, 0.5], "shares": SHARES, "heads": HEADS, "attended": [1]}
    return result | {"bits": [{"bytes_ratio": 0.1, "bits": 4, "losses": {}}], "machine": {"cores": 2}, "own": [[]]}


def refused(path):
    """The line with which a file is refused, the same by every way to it."""
    lines = set()
    for use in (
        lambda: Profile.read(path),
        lambda: whole_heads_of(path, MODEL),
        lambda: ClusteredCache.for_model(MODEL, keep_ratio=0.5, profile=path),
    ):
        with pytest.raises(ValueError, match="path must be a file that `kvcluster tune --json` wrote, got ") as error:
            use()
        lines.add(str(error.value))
    [line] = lines
    assert line.isprintable()
    assert len(line) < 600
    return line.partition(f"got {path}: ")[2]


def test_the_honest_one_is_read_and_other_keys_are_not(honest, tmp_path):
    (tmp_path / "file").write_text(json.dumps(honest))
    profile = Profile.read(tmp_path / "file")
    assert (profile.name, profile.heads, profile.bits) == ("tiny", tuple(map(tuple, HEADS)), ((0.1, 4),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 10**5, "it must be nested at most 32 deep"),
        ('{"own":' * 10**5, "it must be nested at most 32 deep"),
        ('{"own":' * 40 + "1" + "}" * 40, "it must be nested at most 32 deep, got more at own.own.own"),
        ('{"keeps": [0.1, 1e400]}', "keeps[1] of it must be a finite number, got 1e400"),
        ('{"own": {"x": NaN}}', "own.x of it must be a finite number, got NaN"),
        (f'{{"layers": [{LONG}]}}', "layers[0] of it must be an integer of at most 100 digits, got 999"),
        ("[]", "it must be a JSON object, got []"),
        ("3", "it must be a JSON object, got 3"),
        ("null", "it must be a JSON object, got None"),
        ("", "it must be JSON, got ''"),
        ("\x1b[2J" * 1000, "it must be JSON, got '\\x1b[2J"),
        (b"\xff\xfe", "it must be JSON in UTF-8, got b'\\xff"),
        ("{}", "name must be given, got nothing"),
        (" " * (2**24 + 1), "it must have at most 16,777,216 bytes, got 16,777,217"),
    ],
    ids=lambda value: "" if len(value) > 80 else None,
)
def test_what_is_no_plain_json_object_is_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(tmp_path / "file")


INDEX = "must be indexes from 0 to 9999, got"
WRONG = [
    ("name", [], "name must be a text of one line, got []"),
    ("name", "a\x1b[2J", "name must be a text of one line, got 'a\\x1b[2J'"),
    ("weights", [], "weights must be an object of SHA-256 digests in hex, by dtype, got []"),
    ("weights", {"float32": 3}, "weights must be an object of SHA-256"),
    ("weights", {"float32": "\x1b" * 64}, "weights must be an object of SHA-256"),
    ("layers", {}, "layers must be lists, got {}"),
    ("layers", "012", "layers must be lists, got '012'"),
    ("layers", ["0", 1, 2], f"layers {INDEX} '0'"),
    ("layers", [0.0, 1, 2], f"layers {INDEX} 0.0"),
    ("layers", [False, 1, 2], f"layers {INDEX} False"),
    ("layers", [-1, 1, 2], f"layers {INDEX} -1"),
    ("layers", [0, 1, 10**9], f"layers {INDEX} 1000000000"),
    ("layers", [0, 2, 1], "layers must ascend, got (0, 2, 1)"),
    ("layers", [0, 1, 1], "layers must ascend, got (0, 1, 1)"),
    ("layers", [], "shares must be keeps x layers x KV heads"),
    ("keeps", [0.1, "0.5"], "keeps must be numbers, got '0.5'"),
    ("keeps", [0.1, None], "keeps must be numbers, got None"),
    ("keeps", [0.1, 10**99], "keeps must ascend in (0, 1), got (0.1, 1e+99)"),
    ("keeps", [], "shares must be keeps x layers x KV heads"),
    ("shares", [], "shares must be keeps x layers x KV heads"),
    ("shares", [[], []], "shares must be keeps x layers x KV heads"),
    ("shares", [[[], [], []]] * 2, "shares must be keeps x layers x KV heads"),
    ("shares", [SHARES[0], SHARES[1][:2]], "shares must be keeps x layers x KV heads"),
    ("shares", [SHARES[0], 3], "shares must be lists, got 3"),
    ("shares", [SHARES[0], [3, 3, 3]], "shares must be lists, got 3"),
    ("shares", [SHARES[0], ["01", "01", "01"]], "shares must be lists, got '01'"),
    ("shares", [SHARES[0], [[True, 0.3], *SHARES[1][1:]]], "shares must be numbers, got True"),
    ("shares", [SHARES[0], [[-0.1, 0.3], *SHARES[1][1:]]], "shares must be in [0, 1], got -0.1 to 1.0"),
    ("heads", [*HEADS[:-1], [0, 1, 0]], "heads must be pairs of a layer and a KV head, got [0, 1, 0]"),
    ("heads", [*HEADS[:-1], "01"], "heads must be pairs of a layer and a KV head, got '01'"),
    ("heads", [*HEADS[:-1], [0, -1]], f"heads {INDEX} -1"),
    ("heads", HEADS * 2, "heads must be every KV head of every layer, once"),
    ("attended", [-1], f"attended {INDEX} -1"),
    ("attended", {"1": 1}, "attended must be lists, got {'1': 1}"),
    ("attended", [7], "attended must be of the layers (0, 1, 2), got (7,)"),
    ("bits", {"bytes_ratio": 0.1, "bits": 4}, "bits must be lists, got {"),
    ("bits", [4], "bits must be objects with bytes_ratio and bits, got 4"),
    ("bits", [{"bytes_ratio": "x", "bits": 4}], "bytes_ratio of bits must be numbers, got 'x'"),
    ("bits", [{"bytes_ratio": 0.1, "bits": 4.0}], f"bits {INDEX} 4.0"),
    ("bits", [{"bytes_ratio": 0.1, "bits": 5}], "bits must be of ["),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_wrong_value_is_refused_by_its_key(honest, tmp_path, key, value, message):
    (tmp_path / "file").write_text(json.dumps(honest | {key: value}))
    assert message in refused(tmp_path / "file")


@pytest.mark.parametrize("key", ["name", "weights", "layers", "keeps", "shares", "heads"])
def test_a_missing_key_is_named(honest, tmp_path, key):
    honest.pop(key)
    (tmp_path / "file").write_text(json.dumps(honest))
    assert f"{key} must be given, got nothing" in refused(tmp_path / "file")


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    (os.mkfifo if kind == "pipe" else os.mkdir)(tmp_path / "file")
    assert "it must be a file, got " in refused(tmp_path / "file")


@pytest.mark.parametrize(("layers", "n_heads"), [([0, 1, 9], 2), ([0, 1, 2], 1)])
def test_a_profile_of_layers_and_heads_that_the_model_has_not_is_refused(honest, layers, n_heads):
    """Even with the digest of its weights, which anybody can write."""
    shares = [[[0.1] * n_heads] * 3, [[0.5] * n_heads] * 3]
    heads = [[layer, head] for layer in layers for head in range(n_heads)]
    profile = Profile.of(honest | {"layers": layers, "shares": shares, "heads": heads, "attended": None})
    match = rf"profile must be of layers below 3 with 2 KV heads, got layers up to {layers[-1]} with {n_heads}"
    with pytest.raises(ValueError, match=match):
        ClusteredCache.for_model(MODEL, keep_ratio=0.5, profile=profile)
