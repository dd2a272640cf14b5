"""Tokens per second that vLLM generates, against the size of its pool: stock, and with clustered pages.

Every run is a process of its own that loads SmolLM2, sends all its requests at once and takes the time of each step of
the engine. Contenders come in turn, so that all meet the same machine. Two rates are told apart: one of the steps that
only generate, and one of the whole run, in which the prompts are read too.

`python pools.py CONTENDER CASE CLOCK` is one such run, by the clock `wall` or `processor`; run.py starts all of them.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["CASES", "N_PROMPT", "PAGE", "measure_pools", "show_pools"]

PAGE, N_PROMPT = 32, 2000
CONTENDERS = {
    "stock": None,
    "keep 0.5": {"keep_ratio": 0.5, "chunk_size": 128, "n_recent": 32},
    "keep 0.25": {"keep_ratio": 0.25, "chunk_size": 128, "n_recent": 32},
}
# Blocks of the pool, requests (three times what stock can serve at once), tokens generated for each, and rounds.
CASES = ((150, 6, 256, 1), (230, 9, 256, 2), (310, 12, 256, 1), (230, 9, 1024, 1))
LEAST = {"at_once": 3.0, "decode": 2.0}  # keep 0.25 / stock, in the pool that holds three stock requests

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path


def serve(contender, n_blocks, n_requests, n_new, clock):
    """One run in this process: what it held and how long it took."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from kvcluster.evaluation.models import smollm2_folder
    from kvcluster.evaluation.texts import built_in_text, encode

    method = CONTENDERS[contender]
    llm = LLM(
        str(smollm2_folder()),
        dtype="bfloat16",
        enforce_eager=True,
        block_size=PAGE,
        num_gpu_blocks_override=n_blocks,
        kv_cache_memory_bytes=2**30,
        gpu_memory_utilization=0.1,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        additional_config={} if method is None else {"kvcluster": method},
    )
    tokens = encode(llm.get_tokenizer(), built_in_text())
    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    n_free, scheduled = pool.get_num_free_blocks(), []
    schedule = scheduler.schedule

    def recorded(*args, **kwargs):
        step = schedule(*args, **kwargs)
        running, held = len(scheduler.running), n_free - pool.get_num_free_blocks()
        scheduled.append((len(step.num_scheduled_tokens), step.total_num_scheduled_tokens, running, held))
        n_preempted.append(len(step.preempted_req_ids or ()))
        return step

    def ask(name, prompt, n):
        parameters = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), parameters)

    n_preempted = []
    scheduler.schedule = recorded
    ask("warm up", tokens[-N_PROMPT:], 4)
    while engine.has_unfinished_requests():
        engine.step()
    scheduled.clear()
    n_preempted.clear()
    for number in range(n_requests):
        ask(str(number), tokens[number * N_PROMPT : (number + 1) * N_PROMPT], n_new)
    seconds = []
    while engine.has_unfinished_requests():
        start = clock()
        engine.step()
        seconds.append(clock() - start)
    steps = list(zip(scheduled, seconds, strict=True))
    decoding = [(step, second) for step, second in steps if step[0] == step[1]]  # one token for each request
    return {
        "at_once": max(running for _, _, running, _ in scheduled),
        "held": max(held for *_, held in scheduled),
        "leaked": n_free - pool.get_num_free_blocks(),
        "preempted": sum(n_preempted),
        "seconds": sum(seconds),
        "whole": n_requests * n_new / sum(seconds),
        "decode": sum(step[0] for step, _ in decoding) / sum(second for _, second in decoding),
        "ms_per_step": 1e3 * statistics.median(second for _, second in decoding),
    }


def run_in_process(contender, case, is_processor_time):
    """`serve` in a fresh process."""
    environment = os.environ | {
        **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
        **{"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"},
        **({"OMP_NUM_THREADS": "1"} if is_processor_time else {}),
    }
    clock = "processor" if is_processor_time else "wall"
    command = [sys.executable, "-W", "ignore", __file__, contender, json.dumps(case[:3]), clock]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise RuntimeError(f"a run failed: {contender}, {case}\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def measure_pools(cases, is_processor_time):
    """All runs, contenders in turn, and the machine they ran on."""
    from rich.progress import track

    load = os.getloadavg()[0]

    turns = [
        (case, name)
        for turn in range(max(case[3] for case in cases))
        for case in cases
        if turn < case[3]
        for name in CONTENDERS
    ]
    runs = {(case[:3], name): [] for case, name in turns}
    for case, name in track(turns, description="Runs"):
        runs[case[:3], name].append(run_in_process(name, case, is_processor_time))
    clock = "processor time of one thread" if is_processor_time else "wall"
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": round(load, 2), "seconds": clock}
    return {
        "about": machine | {"n_prompt": N_PROMPT, "page": PAGE, "contenders": CONTENDERS},
        "found": [
            {"blocks": blocks, "requests": requests, "n_new": n_new, "contender": name, "runs": of_case}
            for ((blocks, requests, n_new), name), of_case in runs.items()
        ],
    }


def spread(numbers, digits=1):
    """Median, and smallest and largest if there are several numbers."""
    text = f"{statistics.median(numbers):,.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ({min(numbers):,.{digits}f} to {max(numbers):,.{digits}f})"


def against_stock(lines, line, name):
    """Ratios to stock in the same pool, turn by turn."""
    (stock,) = (
        candidate
        for candidate in lines
        if candidate["contender"] == "stock"
        and all(candidate[key] == line[key] for key in ("blocks", "requests", "n_new"))
    )
    return [a[name] / b[name] for a, b in zip(line["runs"], stock["runs"], strict=True)]


def show_pools(lines):
    """A table, and whether the targets are met."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    table = Table(title=f"Prompts of {N_PROMPT:,} tokens; SmolLM2-135M, bfloat16")
    for column in ("pool", "requests x tokens", "", "at once", "held", "preempted", "decoding, tokens/s", "/ stock"):
        table.add_column(column)
    table.add_column("with reading")
    table.add_column("/ stock")
    for line in lines:
        runs = line["runs"]
        table.add_row(
            str(line["blocks"]),
            f"{line['requests']} x {line['n_new']:,}",
            line["contender"],
            str(min(run["at_once"] for run in runs)),
            str(max(run["held"] for run in runs)),
            str(max(run["preempted"] for run in runs)),
            spread([run["decode"] for run in runs]),
            spread(against_stock(lines, line, "decode"), 2),
            spread([run["whole"] for run in runs]),
            spread(against_stock(lines, line, "whole"), 2),
        )
    console.print(table)
    for line in lines:
        if (line["contender"], line["blocks"], line["n_new"]) == ("keep 0.25", 230, 256):
            for name, least in LEAST.items():
                ratio = statistics.median(against_stock(lines, line, name))
                verdict = "holds" if ratio >= least else "does not hold"
                console.print(f"keep 0.25 / stock, {name}: {ratio:.2f}, at least {least}: {verdict}", highlight=False)


if __name__ == "__main__":
    name, case, clock = sys.argv[1:]
    print(json.dumps(serve(name, *json.loads(case), time.process_time if clock == "processor" else time.perf_counter)))
