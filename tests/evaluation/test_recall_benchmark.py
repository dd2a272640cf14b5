"""The recall benchmark: its baselines choose what they say, its loop is the model, and a tiny run gives everything."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import equal_in_float32, logits_agree
from models import random_tokens, tiny_llama

from kvcluster.fast import RecallCache

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BATCH, KV_HEADS, GROUP, TOKENS, DIM = 3, 2, 4, 100, 16


@pytest.fixture
def layer():
    """A layer with a context and two new tokens a row, and a query."""
    from benchmarks.recall.methods import Exact

    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(KV_HEADS, TOKENS, DIM, generator=generator) for _ in range(2))
    exact = Exact(keys, values, BATCH)
    exact.append(*(torch.randn(BATCH, KV_HEADS, 2, DIM, generator=generator) for _ in range(2)))
    return exact, torch.randn(BATCH, KV_HEADS, GROUP, DIM, generator=generator)


def all_tokens(exact):
    """Keys and values (batch, kv_heads, tokens, dim) of context and new tokens."""
    pairs = ((exact.keys, exact.new_keys), (exact.values, exact.new_values))
    return [torch.cat([old.expand(BATCH, -1, -1, -1), new], dim=-2) for old, new in pairs]


def make_all(exact, budget):
    from benchmarks.recall.methods import Pages, Recall, Ruled, TopTokens, best_above_mean

    def cache():
        return RecallCache(budget=budget, n_sink=3, tokens_per_cluster=5)

    made = {
        "top": TopTokens(exact, budget),
        "pages": Pages(exact, budget, best_above_mean, page_size=7),
        "recall": Recall(exact, cache()),
        "ruled": Ruled(exact, cache(), best_above_mean),
    }
    for method in made.values():
        method.append(exact.new_keys, exact.new_values)
    return made


@pytest.mark.parametrize("budget", [31, 64, 102, 500])
def test_every_method_spends_the_whole_budget_and_attends_to_what_it_says(layer, budget):
    from benchmarks.recall.methods import Full

    exact, query = layer
    full = Full(exact).attend(query)
    for name, method in make_all(exact, budget).items():
        attended = method.attended(query)
        assert (attended.sum(dim=-1) == min(budget, TOKENS + 2)).all(), name
        assert attended[..., -2:].all(), name
        output, expected = method.attend(query), exact.output(exact.weights(query, attended))
        assert equal_in_float32(output.numpy(), expected.numpy()), name
        assert equal_in_float32(output.numpy(), full.numpy()) == (budget > TOKENS), name


def test_exact_attention_is_the_formula(layer):
    exact, query = layer
    keys, values = all_tokens(exact)
    expected = (query @ keys.mT * DIM**-0.5).softmax(dim=-1) @ values
    assert equal_in_float32(exact.output(exact.weights(query)).numpy(), expected.numpy())
    assert not equal_in_float32(exact.output(exact.weights(0.999 * query)).numpy(), expected.numpy())


def test_rule_of_the_package_ranks_as_the_package_does(layer):
    """`Ruled` differs from `Recall` by its rule alone; with another rule it does differ."""
    from benchmarks.recall.methods import Ruled

    exact, query = layer
    made = make_all(exact, 31)
    assert torch.equal(made["ruled"].attended(query), made["recall"].attended(query))
    by_sum = Ruled(exact, RecallCache(budget=31, n_sink=3, tokens_per_cluster=5), lambda scores: scores.sum(dim=-2))
    by_sum.append(exact.new_keys, exact.new_values)
    assert not torch.equal(by_sum.attended(query), made["recall"].attended(query))


def test_a_budget_by_mass_takes_the_first_clusters_that_have_it(layer):
    """Of the clusters that the budget reaches, in their order, none once those before have the share."""
    from benchmarks.recall.methods import Ruled, best_above_mean

    exact, query = layer
    taken = {}
    for mass in (0.2, 0.6, 1.0):
        method = Ruled(exact, RecallCache(budget=64, n_sink=3, tokens_per_cluster=5), best_above_mean, mass)
        method.append(exact.new_keys, exact.new_values)
        taken[mass] = method.selection(query).taken
    clusters = method.cache.clusters
    logits = (query @ clusters.centroids.mT * DIM**-0.5).double() + clusters.counts.log().unsqueeze(-2)
    shares = logits.softmax(dim=-1).mean(dim=-2)
    for mass in (0.2, 0.6):
        chosen = taken[mass] > 0
        assert (taken[mass] == taken[1.0].where(chosen, 0)).all()
        assert (chosen.sum(dim=-1) < (taken[1.0] > 0).sum(dim=-1)).any()
        is_cut = (taken[mass] != taken[1.0]).any(dim=-1)
        assert (shares.where(chosen, 0).sum(dim=-1)[is_cut] >= mass).all()
    assert (taken[0.2] <= taken[0.6]).all()


def test_pages_bound_every_logit_and_the_best_page_comes_first():
    """By hand: least and greatest numbers of two pages of two tokens; the query prefers the second's corner."""
    from benchmarks.recall.methods import Exact, Pages

    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, -9.0], [-9.0, 3.0]]])
    pages = Pages(Exact(keys, keys, 1), 2, lambda scores: scores.amax(dim=-2), page_size=2)
    query = torch.tensor([[[[1.0, 1.0]]]])  # bounds 2 and 6, though no key of the second page has more than -6
    assert pages.attended(query).tolist() == [[[False, False, True, True]]]

    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(-9, 10, (KV_HEADS, TOKENS, DIM), generator=generator).float()  # small integers: exact sums
    query = torch.randint(-9, 10, (BATCH, KV_HEADS, GROUP, DIM), generator=generator).float()
    pages = Pages(Exact(keys, keys, BATCH), 30, lambda scores: scores.amax(dim=-2), page_size=10)
    bounds = query.clamp(min=0) @ pages.greatest.mT + query.clamp(max=0) @ pages.least.mT
    logits = (query @ keys.mT).unflatten(-1, (-1, 10)).amax(dim=-1)
    assert (logits <= bounds).all()
    assert not (bounds <= logits).any()


def test_top_tokens_have_the_largest_weights(layer):
    from benchmarks.recall.methods import TopTokens

    exact, query = layer
    attended = TopTokens(exact, 12).attended(query)[..., :TOKENS]
    weights = exact.weights(query).sum(dim=-2)[..., :TOKENS]
    assert (weights.where(attended, torch.inf).amin(dim=-1) >= weights.where(~attended, 0).amax(dim=-1)).all()


def test_scoring_loop_is_the_model():
    """Full attention, token by token on a prefilled context: the loss of the model's own forward pass."""
    from benchmarks.recall.methods import Full, TopTokens
    from benchmarks.recall.needles import Context
    from benchmarks.recall.scoring import score
    from kvcluster.evaluation.quality.llama import read_layers

    model = tiny_llama()
    tokens = random_tokens(60)[0].tolist()
    context = Context(tokens[:50], [tokens[50:54], tokens[50:56]], [tokens[54:58], tokens[56:60]])
    read = read_layers(model, context.tokens)
    found = score(model, context, read, lambda exact, layer: Full(exact))

    def losses(model):
        dtype = next(model.parameters()).dtype
        with torch.inference_mode():
            log_probabilities = model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
        each = [-log_probabilities[place - 1, tokens[place]] for place in range(54, 60)]
        return np.array([float(loss) for loss in each], dtype=np.float64 if dtype == torch.float64 else np.float32)

    baseline, oracle = losses(model), losses(model.double())
    model.float()
    ours = np.array(found.nll, dtype=np.float64)
    expected = np.stack([oracle[:4], oracle[2:]])
    assert logits_agree(ours, np.stack([baseline[:4], baseline[2:]]), expected)
    few = score(model, context, read, lambda exact, layer: TopTokens(exact, 20))
    assert not logits_agree(np.array(few.nll), np.stack([baseline[:4], baseline[2:]]), expected)
    assert few.attention["recall_rate"] < 1
    assert few.attention["entries"] == 20


def test_results_can_be_checked_by_hand():
    from benchmarks.recall.settings import FULL
    from benchmarks.recall.tables import collect
    from kvcluster.evaluation.runs import needle_sums

    def run(setting, budget, is_right, context=0):
        key = {"part": "needles", "setting": setting, "budget": budget, "context": context}
        return {"key": key, "needles": needle_sums(is_right, [[0.5, 1.5]] * len(is_right)), "attention": {"mass": 0.5}}

    runs = [
        run(FULL, 0, [[True, True], [True, True]]),
        run("half", 8, [[True, True], [True, False]]),
        run(FULL, 0, [[True, False]], context=1),
        run("half", 8, [[False, False]], context=1),
        run("unfinished", 8, [[True, True], [True, True]]),
    ]
    found = collect(runs)
    assert set(found) == {(FULL, 0), ("half", 8)}
    half = found["half", 8]
    values = [each["value"] for each in (half.accuracy, half.exact, half.kept)]
    assert (half.n_needles, *values, half.nll) == (3, 0.5, 1 / 3, 0.6, 1.0)  # kept: 3 of 6 beside 5 of 6
    assert (half.accuracy["low"], half.accuracy["high"]) == (0, 0.75)  # one context twice
    assert found[FULL, 0].kept["low"] == found[FULL, 0].kept["high"] == 1


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_tiny_run_prints_tables_writes_json_and_draws(tmp_path):
    """And a second run measures nothing again."""
    size = "--tokens 300 --contexts 1 --per-context 2 --budgets 128 --step-tokens 2048 --threads 1"
    command = [sys.executable, str(BENCHMARKS / "recall" / "run.py"), "--parts", "needles", "step", *size.split()]
    command += ["--runs", str(tmp_path / "runs.jsonl"), "--figures", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    written = (tmp_path / "runs.jsonl").read_text()
    made = [json.loads(line) for line in written.splitlines()]
    assert [run["key"]["part"] for run in made] == ["step", *["needles"] * 5]
    assert all(run["needles"]["n"] == 2 for run in made[1:])
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "recall-needles.png",
        "recall-attention.png",
        "recall-options.png",
    }
    assert "pages (Quest)" in first.stdout
    assert "targets met" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert (tmp_path / "runs.jsonl").read_text() == written
