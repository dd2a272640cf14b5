"""Tokens per second that vLLM generates, against the size of its pool: stock, and with clustered pages.

Every run is a process of its own that loads SmolLM2, sends all its requests at once and takes the time of each step of
the engine. Contenders come in turn, so that all meet the same machine. Two rates are told apart: one of the steps that
only generate, and one of the whole run, in which the prompts are read too.

Writes results/pools.json; with --draw, where there is matplotlib, docs/figures/serving-pools.png from it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

PAGE, N_PROMPT = 32, 2000
CONTENDERS = {
    "stock": None,
    "keep 0.5": {"keep_ratio": 0.5, "chunk_size": 128, "n_recent": 32},
    "keep 0.25": {"keep_ratio": 0.25, "chunk_size": 128, "n_recent": 32},
}
# Blocks of the pool, requests (three times what stock can serve at once), tokens generated for each, and rounds.
CASES = ((150, 6, 256, 1), (230, 9, 256, 2), (310, 12, 256, 1), (230, 9, 1024, 1))
LEAST = {"at_once": 3.0, "decode": 2.0}  # keep 0.25 / stock, in the pool that holds three stock requests
RESULTS = Path(__file__).resolve().parent / "results" / "pools.json"
FIGURE = ROOT / "docs" / "figures" / "serving-pools.png"


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path


def serve(contender, n_blocks, n_requests, n_new, clock):
    """One run in this process: what it held and how long it took."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from kvcluster.evaluation.models import smollm2_folder
    from kvcluster.evaluation.texts import built_in_text, encode

    asked = CONTENDERS[contender]
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
        additional_config={} if asked is None else {"kvcluster": asked},
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
    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps([contender, *case[:3]])]
    command += ["--processor-time"] * is_processor_time
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"a run failed: {contender}, {case}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(cases, is_processor_time):
    """All runs, contenders in turn."""
    from rich.progress import track

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
    return [
        {"blocks": blocks, "requests": requests, "n_new": n_new, "contender": name, "runs": of_case}
        for ((blocks, requests, n_new), name), of_case in runs.items()
    ]


def spread(numbers, digits=1):
    """Median, and smallest and largest where there are some."""
    text = f"{statistics.median(numbers):,.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ({min(numbers):,.{digits}f} to {max(numbers):,.{digits}f})"


def against_stock(found, line, name):
    """Ratios to stock in the same pool, turn by turn."""
    (stock,) = (
        each
        for each in found
        if each["contender"] == "stock" and all(each[key] == line[key] for key in ("blocks", "requests", "n_new"))
    )
    return [a[name] / b[name] for a, b in zip(line["runs"], stock["runs"], strict=True)]


def show(found):
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    table = Table(title=f"Prompts of {N_PROMPT:,} tokens; SmolLM2-135M, bfloat16")
    for column in ("pool", "requests x tokens", "", "at once", "held", "preempted", "decoding, tokens/s", "/ stock"):
        table.add_column(column)
    table.add_column("with reading")
    table.add_column("/ stock")
    for line in found:
        runs = line["runs"]
        table.add_row(
            str(line["blocks"]),
            f"{line['requests']} x {line['n_new']:,}",
            line["contender"],
            str(min(run["at_once"] for run in runs)),
            str(max(run["held"] for run in runs)),
            str(max(run["preempted"] for run in runs)),
            spread([run["decode"] for run in runs]),
            spread(against_stock(found, line, "decode"), 2),
            spread([run["whole"] for run in runs]),
            spread(against_stock(found, line, "whole"), 2),
        )
    console.print(table)
    for line in found:
        if (line["contender"], line["blocks"], line["n_new"]) == ("keep 0.25", 230, 256):
            for name, least in LEAST.items():
                ratio = statistics.median(against_stock(found, line, name))
                verdict = "holds" if ratio >= least else "does not hold"
                console.print(f"keep 0.25 / stock, {name}: {ratio:.2f}, at least {least}: {verdict}", highlight=False)


def draw(found, path):
    """Both rates against the pool, with the number of requests at once beside each point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    titles = {"decode": "steps that only generate", "whole": "the whole run, prompts read too"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for contender, colour in COLOURS.items():
            lines = [line for line in found if line["contender"] == contender and line["n_new"] == 256]
            lines.sort(key=lambda line: line["blocks"])
            blocks = [line["blocks"] for line in lines]
            rates = [[run[name] for run in line["runs"]] for line in lines]
            middle = [statistics.median(each) for each in rates]
            low = [m - min(each) for m, each in zip(middle, rates, strict=True)]
            high = [max(each) - m for m, each in zip(middle, rates, strict=True)]
            axis.errorbar(blocks, middle, (low, high), fmt="o-", color=colour, capsize=3, label=contender)
            for line, x, y in zip(lines, blocks, middle, strict=True):
                label = f"{min(run['at_once'] for run in line['runs'])} at once"
                axis.annotate(label, (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axis.set(xlabel=f"blocks of the pool, {PAGE} tokens each", ylabel="generated tokens per second", title=title)
        axis.set_xticks(blocks)
        axis.margins(x=0.12)
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    axes[0].legend()
    figure.suptitle(
        f"vLLM on this CPU, prompts of {N_PROMPT:,} tokens, 256 generated: the same pool serves more at once"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, action="append", help="[blocks, requests, tokens, rounds]")
    parser.add_argument(
        "--processor-time", action="store_true", help="one thread and its processor time: where others use the machine"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw what the JSON holds")
    asked = parser.parse_args()
    if asked.one is not None:
        print(json.dumps(serve(*asked.one, time.process_time if asked.processor_time else time.perf_counter)))
        return
    if asked.draw:
        draw(json.loads(asked.json.read_text())["found"], asked.figure)
        return
    load = os.getloadavg()[0]
    found = measure(CASES if asked.case is None else tuple(map(tuple, asked.case)), asked.processor_time)
    clock = "processor time of one thread" if asked.processor_time else "wall"
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": round(load, 2), "seconds": clock}
    about = machine | {"n_prompt": N_PROMPT, "page": PAGE, "contenders": CONTENDERS}
    asked.json.write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
