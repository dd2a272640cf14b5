"""vLLM engines inside this process, and a look at their blocks and pages."""

import numpy as np
import torch
from vllm import LLM, SamplingParams, TokensPrompt

from kvcluster.fast.vllm.pages import cells_of, counts_of, keys_of, values_of

PAGE = 32
# Small chunks and few recent tokens, so that short prompts have clusters: of 300 tokens one chunk, of 600 four.
CLUSTERED = {"keep_ratio": 0.25, "chunk_size": 128, "n_recent": 20}


class Engine:
    """A model served greedily, whose steps can be watched.

    Of the last run `records` holds how many requests ran in each step and how many blocks they held, `preempted` the
    ids of those that lost their blocks for a time.
    """

    def __init__(self, model, kvcluster=None, *, n_blocks=200, dtype="float32", **options):
        self.llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            dtype=dtype,
            block_size=PAGE,
            num_gpu_blocks_override=n_blocks,
            kv_cache_memory_bytes=2**30,
            gpu_memory_utilization=0.1,
            seed=0,
            disable_log_stats=True,
            additional_config={} if kvcluster is None else {"kvcluster": kvcluster},
            **{
                "enforce_eager": True,
                "max_model_len": 1024,
                "max_num_batched_tokens": 1024,
                "enable_prefix_caching": False,
            }
            | options,
        )
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.n_free = self.pool.get_num_free_blocks()
        self.records, self.preempted, self.n_asked = [], set(), 0
        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt_request

        def recorded(*args, **kwargs):
            result = schedule(*args, **kwargs)
            self.records.append((len(self.scheduler.running), self.n_held))
            return result

        def noted(request, *args, **kwargs):
            self.preempted.add(request.request_id.split("-")[0])
            return preempt(request, *args, **kwargs)

        self.scheduler.schedule, self.scheduler._preempt_request = recorded, noted

    @property
    def n_held(self):
        """Blocks that requests hold."""
        return self.n_free - self.pool.get_num_free_blocks()

    @property
    def most_at_once(self):
        return max(running for running, _ in self.records)

    def ask(self, prompt, n_new):
        """Send a request; its id."""
        self.n_asked += 1
        parameters = SamplingParams(temperature=0, max_tokens=n_new, ignore_eos=True, detokenize=False)
        request = str(self.n_asked)
        self.llm.llm_engine.add_request(request, TokensPrompt(prompt_token_ids=prompt), parameters)
        return request

    def step(self):
        """Ids and tokens of the requests that finished in this step."""
        return {
            output.request_id: list(output.outputs[0].token_ids)
            for output in self.llm.llm_engine.step()
            if output.finished
        }

    def generate(self, prompts, n_new=24, after_step=lambda: None):
        """The new tokens of each prompt; `n_new` may be a list. No block may be held in the end."""
        self.records.clear()
        self.preempted.clear()
        lengths = n_new if isinstance(n_new, list) else [n_new] * len(prompts)
        asked = [self.ask(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
        finished = {}
        while self.llm.llm_engine.has_unfinished_requests():
            finished |= self.step()
            after_step()
        assert self.n_held == 0, f"{self.n_held} blocks leaked"
        return [finished[request] for request in asked]


def random_prompts(sizes, seed=0, vocabulary=97):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, size).tolist() for size in sizes]


class Watched:
    """The exact keys and values of every request of the last step, seen as they enter the attention of each layer.

    `requests` are the ids in the order of the batch, `seen[id][layer]` keys and values (heads, tokens, dim).
    """

    def __init__(self, engine, monkeypatch):
        self.runner, self.seen = engine.runner, {}
        context = self.runner.vllm_config.compilation_config.static_forward_context
        for number, layer in enumerate(context.values()):
            monkeypatch.setattr(layer.impl, "forward", self.watching(number, layer.impl.forward))

    def watching(self, number, forward):
        def watched(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs):
            starts, ends = self.runner.query_start_loc.cpu, self.runner.seq_lens
            for row, request in enumerate(self.requests):
                tokens = slice(int(starts[row]), int(starts[row + 1]))
                first = int(ends[row]) - (tokens.stop - tokens.start)
                before = self.seen.setdefault(request, {}).get(number)
                new = tuple(x[tokens].transpose(0, 1).clone() for x in (key, value))
                if first:
                    new = tuple(torch.cat([old[:, :first], x], dim=1) for old, x in zip(before, new, strict=True))
                self.seen[request][number] = new
            return forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

        return watched

    @property
    def requests(self):
        return list(self.runner.input_batch.req_ids)

    def held(self, request, rule, number=0):
        """Keys, values and counts (heads, entries, ...) in the pages of a request, read by the rule."""
        batch = self.runner.input_batch
        row = batch.req_id_to_index[request]
        n_tokens, n_prompt = self.seen[request][number][0].shape[1], int(batch.num_prompt_tokens[row])
        n_chunks = rule.n_chunks(n_tokens, n_prompt)
        table = batch.block_table.block_tables[0].block_table.np[row]
        blocks = torch.from_numpy(table[rule.kept_pages(n_tokens, n_chunks)]).long()
        dim, cells = self.seen[request][number][0].shape[2], cells_of(self.runner.kv_caches[number])
        n_stored = rule.n_stored(n_tokens, n_chunks)
        keys = keys_of(cells, PAGE, dim)[blocks].permute(1, 0, 3, 2).flatten(1, 2)
        values = values_of(cells, PAGE, dim)[blocks].permute(1, 0, 2, 3).flatten(1, 2)
        counts = counts_of(cells, PAGE, dim)[blocks].permute(1, 0, 2).flatten(1, 2).clone()
        body = slice(rule.n_sink, rule.n_sink + n_chunks * rule.entries)
        counts[:, : body.start] = counts[:, body.stop :] = 1  # pages of tokens have none
        return tuple(x[:, :n_stored] for x in (keys, values, counts))
