"""The plugin does nothing unless it is asked, says what it cannot do, and runs in engines of several processes."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from engines import CLUSTERED, PAGE, random_prompts
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcluster.fast import vllm as plugin
from kvcluster.fast.vllm.settings import Settings, check_engine, check_layer, settings_of


def asking(parameters):
    return SimpleNamespace(additional_config={"kvcluster": parameters})


def engine_config(**changes):
    """As much of vLLM's config as is looked at; `changes` are attributes of any of its parts."""
    model = {"use_mla": False, "is_hybrid": False, "is_encoder_decoder": False, "model": "m"}
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    whole = {"kv_transfer_config": None, "speculative_config": None}
    model, cache, parallel, whole = (
        {name: changes.get(name, value) for name, value in part.items()}
        for part in (model, {"cache_dtype": "auto"}, parallel, whole)
    )
    parts = {"model_config": model, "cache_config": cache, "parallel_config": parallel}
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in parts.items()}, **whole)


def test_nothing_is_changed_unless_it_is_asked(engine):
    served = engine()
    assert type(served.manager.kv_cache_spec) is FullAttentionSpec
    layers = served.runner.vllm_config.compilation_config.static_forward_context.values()
    assert {type(layer.impl) for layer in layers} == {CPUAttentionBackendImpl}
    assert served.runner.kv_caches[0].shape == (200, 2, PAGE, 64)


def test_the_environment_asks_too(monkeypatch):
    monkeypatch.setenv("KVCLUSTER_VLLM", json.dumps(CLUSTERED))
    assert settings_of(SimpleNamespace(additional_config={})) == Settings(**CLUSTERED)
    assert settings_of(asking({"keep_ratio": 0.5})) == Settings(0.5)  # what the engine is told comes first


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep_ratio": 1.5}, "keep_ratio must be in"),
        ({"keep": 0.5}, "must be a mapping with keep_ratio"),
        ({"keep_ratio": 0.5, "chunk": 64}, "must have parameters among .*got 'chunk'"),
        (
            {"keep_ratio": 0.5, "method": "evict"},
            "method must be one of soft_matching, distinctive, attended, got 'evict'",
        ),
        ({"keep_ratio": 0.5, "n_shared": 0}, "n_shared must be .* got 0"),
        (
            {"keep_ratio": 0.5, "method": "soft_matching", "n_shared": 4},
            r"method 'soft_matching' must have parameters among \[\], got 'n_shared'",
        ),
        ({"keep_ratio": 0.5, "profile": "p.json"}, "profile must be absent in vLLM, .*give keep_ratio, .*got 'p.json'"),
        ({"profile": "known"}, "profile must be absent in vLLM, .* for all heads, got 'known'"),
        ([0.5], "must be a mapping with keep_ratio"),
    ],
)
def test_wrong_parameters_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        settings_of(asking(parameters))


def test_text_that_is_not_json_is_refused(monkeypatch):
    monkeypatch.setenv("KVCLUSTER_VLLM", "keep_ratio=0.5")
    with pytest.raises(ValueError, match=r"KVCLUSTER_VLLM must be JSON, got 'keep_ratio=0\.5'"):
        settings_of(SimpleNamespace(additional_config={}))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"chunk_size": 100}, "chunk_size must be a multiple of the block size 32, got 100"),
        ({"chunk_size": 96}, r"keep_ratio \* chunk_size must be a multiple of the block size 32, got 24"),
        ({"chunk_size": 128, "n_sink": 4}, "n_sink must be a multiple of the block size 32, got 4"),
        ({"chunk_size": 128, "n_recent": -1}, "n_recent must be .* got -1"),
        ({"chunk_size": 0}, "chunk_size must be .* got 0"),
        ({"keep_ratio": 0.2501}, "for a chunk_size of at most 4096, got keep_ratio 0.2501"),
    ],
)
def test_numbers_that_do_not_fit_pages_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"keep_ratio": 0.25} | parameters).rule(PAGE)


@pytest.mark.parametrize(
    ("keep_ratio", "page", "chunk"), [(0.25, 32, 256), (0.2, 32, 320), (0.25, 128, 512), (1, 16, 256)]
)
def test_the_default_chunk_is_whole_pages_before_and_after(keep_ratio, page, chunk):
    assert Settings(keep_ratio).rule(page).chunk_size == chunk


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv_transfer_config", "a connector", "kv_transfer_config must be None, got a connector"),
        ("speculative_config", "a draft model", "speculative_config must be None, got a draft model"),
        ("cache_dtype", "fp8_e4m3", "kv_cache_dtype must not be quantized, got fp8_e4m3"),
        ("use_mla", True, "the model must not use MLA, got m"),
        ("is_hybrid", True, "the model must have attention in every layer, got m"),
        ("is_encoder_decoder", True, "the model must be a decoder, got m"),
        ("decode_context_parallel_size", 2, "decode_context_parallel_size must be 1, got 2"),
        ("prefill_context_parallel_size", 2, "prefill_context_parallel_size must be 1, got 2"),
    ],
)
def test_engines_that_cannot_be_served_are_refused(name, value, message):
    check_engine(engine_config())
    with pytest.raises(ValueError, match=f"kvcluster: {message}"):
        check_engine(engine_config(**{name: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_size": 72}, "head_size must be a multiple of 16, got 72"),
        ({"sliding_window": 128}, "sliding window, got 128"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "cap their logits, got 30.0"),
        ({"sinks": "some"}, "learned attention sinks"),
        ({"attn_type": "encoder"}, "a decoder's, got encoder"),
        ({"kv_sharing_target": "layer 3"}, "share the cache of another, got layer 3"),
    ],
)
def test_layers_that_cannot_be_served_are_refused(change, message):
    plain = {"head_size": 64, "sliding_window": None, "alibi_slopes": None, "logits_soft_cap": None, "sinks": None}
    plain |= {"attn_type": "decoder", "kv_sharing_target": None}
    check_layer(**plain)
    with pytest.raises(ValueError, match=message):
        check_layer(**plain | change)


def test_a_refusal_comes_before_anything_is_served(engine):
    with pytest.raises(ValueError, match="chunk_size must be a multiple of the block size 32, got 100"):
        engine({"keep_ratio": 0.5, "chunk_size": 100})
    with pytest.raises(ValueError, match="kvcluster: kv_cache_dtype must not be quantized, got fp8"):
        engine(CLUSTERED, kv_cache_dtype="fp8_e4m3")


def test_another_version_of_vllm_is_refused(monkeypatch):
    monkeypatch.setattr(plugin, "vllm_version", lambda: "0.33.1")
    registered = []
    monkeypatch.setattr("kvcluster.fast.vllm.backend.register_backend", lambda *_: registered.append(1))
    plugin.register()  # a warning: nobody asked
    assert not registered
    monkeypatch.setenv("KVCLUSTER_VLLM", json.dumps(CLUSTERED))
    with pytest.raises(RuntimeError, match=r"kvcluster: vLLM must be one of 0\.32, got 0\.33\.1"):
        plugin.register()
    monkeypatch.setattr(plugin, "vllm_version", lambda: "0.32.5")
    plugin.register()
    assert registered


PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt

if __name__ == "__main__":
    model, clustered, prompts, options = json.loads(sys.argv[1])
    llm = LLM(model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, block_size=32, max_model_len=1024,
              num_gpu_blocks_override=200, kv_cache_memory_bytes=2**30, gpu_memory_utilization=0.1,
              additional_config={"kvcluster": clustered}, **options)
    parameters = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False)
    made = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in made]))
"""


def tokens_of_program(folder, parameters, prompts, **options):
    """What an engine in processes of its own generates."""
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([str(folder), parameters, prompts, options])],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("TOKENS "))


@pytest.mark.parametrize("options", [{}, {"tensor_parallel_size": 2}], ids=["a process of its own", "tensor parallel"])
def test_engines_of_several_processes_generate_the_same(engine, tiny, options):
    """The published method, whose heads decide by themselves, so that each rank decides as one process does."""
    parameters = CLUSTERED | {"method": "chunked"}  # as version 0.1 called it
    prompts = random_prompts([300, 40, 600], seed=6)
    made = tokens_of_program(tiny, parameters, prompts, **options)
    assert made == engine(parameters).generate(prompts, 48)
