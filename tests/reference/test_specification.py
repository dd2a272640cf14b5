"""Every paragraph of reference/SPECIFICATION.md is enforced by tests that exist; some of them are here."""

import ast
import inspect
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from agreement import assert_same_bits, equal_in_float64
from inputs import DTYPES, make_keys, to_numpy, to_torch

from kvcluster import fast, reference
from kvcluster.reference import agreement, soft_matching
from kvcluster.reference.cluster_scores import cluster_scores
from kvcluster.reference.recall import mean_deviations, round_to_bfloat16

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "reference" / "SPECIFICATION.md").read_text()
NAMES = """Arrays and dtypes, Arithmetic, `alternating_partition`, `similarity`, `chunked_soft_matching`, `merge`,
`attention`, `clustered_attention`, `ClusteredCache`, `kmeans`, `select_clusters`, `recall_attention`, `RecallCache`,
Errors, Agreement of attention outputs, `distinctive_matching`, `ChelseaCache`, `RaggedCache`, `quantize` and `bits`,
`attended_matching`"""
SECTIONS = [f"{number} {name}" for number, name in enumerate(re.split(r",\s", NAMES), 1)]
KNOWN = {
    f"{path.relative_to(ROOT)}::{node.name}"
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}
PARAGRAPH = re.compile(r"\*\*(\S+)\*\* .+\n\nTests: (`[^`, ]+`(?:, `[^`, ]+`)*)")
BOTH = ((reference, np.copy, np.asarray), (fast, to_torch, to_numpy))


def faults(page, sections, known):
    """What is wrong with a page: its sections, the numbers of its paragraphs, the tests that they name."""
    titles = re.findall(r"(?m)^## (.*)$", page)
    found = [] if titles == sections else [f"sections must be {sections}, got {titles}"]
    for section in re.split(r"(?m)^## ", page)[1:]:
        _, *paragraphs = re.split(r"\n\n(?!Tests: )", section.strip())
        found += [] if paragraphs else [f"a section must have a paragraph, got {section}"]
        for number, paragraph in enumerate(paragraphs, 1):
            parts = PARAGRAPH.fullmatch(paragraph)
            if not parts or parts[1] != f"{section.split()[0]}.{number}":
                found.append(f"paragraph {number} must be '**number** text' and a line of tests, got {paragraph}")
            named = re.findall("`(.+?)`", parts[2]) if parts else []
            found += [f"a test must exist, got {name}" for name in named if name not in known]
    return found


def test_every_paragraph_names_tests_that_exist():
    assert faults(PAGE, SECTIONS, KNOWN) == []
    assert "\nArithmetic contract version 1, of kvcluster 0.2.\n" in PAGE


RIGHT = """## 1 A\n\n**1.1** Yes.\n\nTests: `a::b`\n\n**1.2** No.\n\nTests: `a::b`, `a::c`\n
## 2 B\n\n**2.1** So.\n\nTests: `a::c`\n"""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Tests: `a::b`\n\n", ""),
        ("Tests: `a::b`\n\n", "Tests: a::b\n\n"),
        ("`a::c`\n\n##", "`a::d`\n\n##"),
        ("**1.2**", "**1.1**"),
        ("**1.2**", "**1.3**"),
        ("## 2 B\n\n", ""),
        ("**2.1** So.\n\nTests: `a::c`\n", ""),
        ("Yes.", "Yes.\n\nAnd no."),
    ],
)
def test_a_wrong_page_is_told_apart(right, wrong):
    assert faults(RIGHT, ["1 A", "2 B"], {"a::b", "a::c"}) == []
    assert faults(RIGHT.replace(right, wrong, 1), ["1 A", "2 B"], {"a::b", "a::c"})


def column(*numbers):
    return np.array(numbers, dtype=np.float32)[:, None]


def labels_by_both(keys, **parameters):
    expected = reference.chunked_soft_matching(keys, **parameters).labels
    assert_same_bits(fast.chunked_soft_matching(to_torch(keys), **parameters).labels, expected)
    return expected.tolist()


def test_the_sign_of_a_zero_decides_nothing():
    """-0.0 ties with 0.0 among the matches of source 0, and among the best matches of sources 0 and 2."""
    keys = np.array([[[1, 0], [-0.0, -1], [0, 0], last] for last in ([0, 1], [-0.0, -2])], dtype=np.float32)
    assert np.signbit(reference.similarity(keys[:, :1], keys[:, 1::2])).tolist() == [[[True, False]], [[True, True]]]
    assert labels_by_both(keys, keep_ratio=0.75, chunk_size=4) == [[0, 0, 1, 2]] * 2


def test_chunks_have_their_target_and_the_rest_stays():
    """0.07 * 100 is 7.000000000000001 in float64, and float32's 0.07 is 0.07000000029."""
    keys = make_keys("normal", (100, 4), DTYPES["f32"], seed=0)
    for keep_ratio, target in ((0.07, 8), (np.float32(0.07), 8), (np.float32(0.5), 50), (5e-324, 1)):
        assert max(labels_by_both(keys, keep_ratio=keep_ratio, chunk_size=100)) == target - 1
    assert labels_by_both(np.ones((8, 4), dtype=np.float32), keep_ratio=0.4, chunk_size=5) == [0, 0, 0, 0, 1, 2, 3, 4]


def test_rounds_have_means_of_original_tokens(monkeypatch):
    keys = make_keys("normal", (10, 8), DTYPES["bf16"], seed=1)
    rounds, right = [], soft_matching.match_round

    def recorded(centroids, n_merged):
        rounds.append((centroids, n_merged, right(centroids, n_merged)))
        return rounds[-1][2]

    monkeypatch.setattr(soft_matching, "match_round", recorded)
    labels, entries = labels_by_both(keys, keep_ratio=0.2, chunk_size=10), np.arange(10)
    assert [(len(centroids), n_merged) for centroids, n_merged, _ in rounds] == [(10, 5), (5, 2), (3, 1)]
    for centroids, _, entry_of_entry in rounds:
        means = reference.merge(keys, reference.Clustering(entries, np.bincount(entries)))
        assert (centroids.dtype, centroids.tobytes()) == (np.float32, means.tobytes())
        entries = entry_of_entry[entries]
    assert entries.tolist() == labels


def test_the_order_of_entries_is_irrelevant():
    query, keys, values = (make_keys("normal", (2, n, 8), DTYPES["f32"], seed=n) for n in (3, 50, 51))
    values, counts = values[:, 1:], np.random.default_rng(2).integers(0, 9, (2, 50))
    output = reference.clustered_attention(query, keys, values, counts)
    shuffled = [array[:, np.random.default_rng(3).permutation(50)] for array in (keys, values, counts)]
    assert equal_in_float64(reference.clustered_attention(query, *shuffled), output)
    assert not equal_in_float64(reference.clustered_attention(query, *shuffled[:2], counts), output)


def test_centred_centroids_by_hand():
    """Less the mean, 1/3, the third centroid is the second; it stays empty, and has lost its 1e-9 by rounding."""
    for package, convert, back in BOTH:
        made = package.kmeans(convert(column(0, 1, 0)), n_clusters=3, init=convert(column(1, 0, 1e-9)), is_centred=True)
        assert back(made.labels).tolist() == [1, 0, 1]
        assert back(made.centroids).tolist() == [[1], [0], [0]]


def test_scores_by_hand():
    """The mean of clusters that are not empty, and `spread * |q|`, are rounded to float32; the best query counts."""
    mean, reach = float(np.float32(1 / 3)), float(np.float32(0.3))
    scores = cluster_scores(column(1, -2), column(1, 0, 9, 0), np.array([5, 1, 0, 2]), column(0, 0, 0, 0), 0.3)
    assert scores.tolist() == [1 - mean, 2 * mean, 9 - mean, 2 * mean]
    scores = cluster_scores(column(-1), column(0, 0, 0), np.array([1, 3, 0]), column(1, 0, 7), 0.3)
    assert scores.tolist() == [reach / 2, -reach / 2, 7 * reach - reach / 2]


SMALL = {"budget": 40, "n_sink": 2, "tokens_per_cluster": 3, "segment_size": 20}


def test_a_segment_is_kmeans_of_its_tokens_rounded_to_bfloat16():
    keys = make_keys("normal", (2, 23, 8), DTYPES["f32"], seed=4)
    made = reference.kmeans(keys[:, 2:22], n_clusters=7, max_iter=4, is_centred=True)
    centroids, away = round_to_bfloat16(made.centroids), round_to_bfloat16(mean_deviations(keys[:, 2:22], made))
    rounded = reference.Clusters(made.labels, made.counts, centroids)
    assert (round_to_bfloat16(mean_deviations(keys[:, 2:22], rounded)) != away).any()  # wrong twin: rounded too early
    for package, convert, back in BOTH:
        cache = package.RecallCache(**SMALL, prompt_segment_size=0, is_centred=True)
        cache.append(convert(keys), convert(keys))
        held = (cache.clusters.labels, cache.clusters.centroids, cache.deviations)
        assert [back(x).tobytes() for x in held] == [x.tobytes() for x in (made.labels, centroids, away)]


@pytest.mark.parametrize(("package", "convert", "back"), BOTH, ids=["reference", "fast"])
def test_a_recall_cache_depends_on_its_first_append_alone(package, convert, back):
    """An empty one is not the first, later ones may be split, and what the caller does to its arrays is no matter."""
    keys, held = make_keys("normal", (2, 99, 8), DTYPES["f32"], seed=5), []
    for stops in ([40, 99], [0, 0, 40, 40, *range(41, 100)], [1, 99]):
        cache, given = package.RecallCache(**SMALL, prompt_segment_size=30), convert(keys)
        for start, stop in itertools.pairwise([0, *stops]):
            cache.append(given[:, start:stop], given[:, start:stop])
            given[:, start:stop] = 0
        assert back(cache.keys).tobytes() == keys.tobytes()
        held.append(back(cache.clusters.labels).tolist())
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize("number", [5, 9, 10, 11, 13, 17, 18, 19])
def test_defaults_are_those_of_the_specification(number):
    given = inspect.signature(getattr(reference, SECTIONS[number - 1].split("`")[1])).parameters.values()
    text = re.search(rf"(?m)^\*\*{number}\.1\*\* (.*)$", PAGE)[1]
    assert set(re.findall(r"`(\w+=\S+)`", text)) == {f"{p.name}={p.default}" for p in given if p.default is not p.empty}


def test_the_bound_by_hand():
    """Of the values 1 and 1 + 2**-10 the mean rounds to 1: the baseline is wrong by 2**-11, in every order."""
    ones, values = np.ones((2, 1), dtype=np.float16), column(1, 1 + 2.0**-10).astype(np.float16)
    agreed = agreement.attention_agreement(ones[:1], ones[:1], ones, values)
    assert (agreed.error, agreed.bound) == (2.0**-11, 2 * (2.0**-11 + 2.0**-10 * (1 + 2.0**-11)))
    for name, eps in (("f16", 2.0**-10), ("bf16", 2.0**-7), ("f32", 2.0**-23)):
        one = np.ones((1, 1), dtype=DTYPES[name])
        assert agreement.attention_agreement(one, one, one, one).bound == 2 * eps
    assert agreement.error_bound([[1, 4], [3, 0]], np.float64([[[-5]], [[6]]]), 0.5).tolist() == [11, 14]
    assert agreement.sum_in_order(np.float32([2**24, 1, 1])) == 2**24  # one term after the other, in float32
    arrays = [*(make_keys("normal", (n, 5), DTYPES["f32"], seed=n) for n in (2, 7, 7)), np.arange(7)]
    rng, orders = np.random.default_rng(0), [(np.arange(5), np.arange(7))]
    orders += [(rng.permutation(5), rng.permutation(7)) for _ in range(7)]
    for output, (features, entries) in zip(agreement.baselines(*arrays, None), orders, strict=True):
        shuffled = arrays[0][:, features], arrays[1][entries][:, features], arrays[2][entries], arrays[3][entries]
        assert np.array_equal(output, agreement.plain_attention(*shuffled, None))
