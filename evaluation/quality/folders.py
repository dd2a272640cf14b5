"""Cases from files that the user has: LongBench's and RULER's JSON lines. Nothing is downloaded.

Each line is split where its question begins, which the cache must not see.
"""

import json
from pathlib import Path
from typing import Any

from ..texts import encode, opening
from .cases import Case, Prompt

__all__ = ["longbench_cases", "ruler_cases"]

# Of each dataset of LongBench: its metric, the tokens to generate, and what is asked after the context.
ANSWER = "\n\nAnswer the question about the text above, briefly.\n\nQuestion: {input}\nAnswer:"
CHINESE = "\n\n请根据上文简短回答问题。\n\n问题: {input}\n回答: "
SUMMARY, CHINESE_SUMMARY = "\n\nSummarize the text above.\n\nSummary:", "\n\n请总结上文。\n\n总结: "
LONGBENCH: dict[str, tuple[str, int, str]] = {
    **dict.fromkeys(("narrativeqa", "qasper"), ("F1", 128, ANSWER)),
    "multifieldqa_en": ("F1", 64, ANSWER),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), ("F1", 32, ANSWER)),
    "multifieldqa_zh": ("Chinese F1", 64, CHINESE),
    "dureader": ("Chinese ROUGE-L", 128, CHINESE),
    **dict.fromkeys(("gov_report", "multi_news"), ("ROUGE-L", 512, SUMMARY)),
    "qmsum": ("ROUGE-L", 512, "\n\nAnswer by the transcript above.\n\nQuery: {input}\nAnswer:"),
    "vcsum": ("Chinese ROUGE-L", 512, CHINESE_SUMMARY),
    **dict.fromkeys(("trec", "lsht"), ("classification", 64, "\n{input}")),
    "triviaqa": ("F1 of first line", 32, "\n\n{input}"),
    "samsum": ("ROUGE-L of first line", 128, "\n\n{input}"),
    "passage_count": ("count", 32, "\n\nHow many of the paragraphs above are different? Answer: "),
    "passage_retrieval_en": (
        "paragraph",
        32,
        "\n\nAn abstract: {input}\n\nIt is of which paragraph? Answer: Paragraph",
    ),
    "passage_retrieval_zh": ("paragraph", 32, "\n\n摘要: {input}\n\n摘要出自哪一段? 答案: 段落"),
    **dict.fromkeys(("lcc", "repobench-p"), ("code similarity", 64, "{input}")),
}
RULER_MARKS = ("\nQuestion:", "\nWhat ")  # where the question begins: at the last of them
RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # to generate, by the start of the task's name


def longbench_cases(tokenizer: Any, folder: Path, *, n_tokens: int, n_cases: int) -> list[Case]:
    """The first `n_cases` of each `<dataset>.jsonl` in `folder`; of contexts over `n_tokens` the middle is left out.

    Prompts are LongBench's own if `dataset2prompt.json` and `dataset2maxlen.json` of its repository lie there too, in
    `config/` or beside the data; otherwise short ones of ours, and results are not to be compared with published ones.
    The ending `_e` of a dataset's name, as in LongBench-E, is ignored.

    Raises
    ------
    ValueError : no such files; an unknown dataset; a line that is not of this format; a prompt whose question comes
        before its context.
    """
    prompts, lengths = (known(folder, name) for name in ("dataset2prompt.json", "dataset2maxlen.json"))
    cases = []
    for path in files(folder):
        dataset = path.stem.removesuffix("_e")
        if dataset not in LONGBENCH:
            raise ValueError(f"files must be named as datasets of LongBench, {', '.join(LONGBENCH)}, got {path.name}")
        metric, n_new, ending = LONGBENCH[dataset]
        before, mark, after = prompts.get(dataset, "{context}" + ending).partition("{context}")
        if not mark or "{input}" in before:
            raise ValueError(
                f"prompt of {dataset} must have its context before its question, got {before + mark + after!r}"
            )
        fields = ("input", "context", "answers", "all_classes")
        for number, line in enumerate(lines(path, fields, n_cases)):
            question = after.replace("{input}", line["input"])
            prompt = Prompt(
                encode(tokenizer, question or "\n"),
                line["answers"],
                metric,
                int(lengths.get(dataset, n_new)),
                line["all_classes"] or [],
            )
            read = encode(tokenizer, before.replace("{input}", "") + line["context"])
            context = without_middle(opening(tokenizer) + read, n_tokens)
            cases.append(Case(f"longbench {dataset}", number, context, prompts=[prompt]))
    return cases


def ruler_cases(tokenizer: Any, folder: Path, *, n_tokens: int, n_cases: int) -> list[Case]:
    """The first `n_cases` of each `<task>.jsonl` or `<task>/validation.jsonl` in `folder`, as RULER writes them.

    Raises
    ------
    ValueError : no such files; a line that is not of this format, without a question, or longer than `n_tokens`.
    """
    cases = []
    for path in files(folder):
        task = path.parent.name if path.stem in ("validation", "test") else path.stem
        n_new = next((n for start, n in RULER_TOKENS.items() if task.startswith(start)), 128)
        metric = "match part" if task.startswith("qa") else "match all"
        for number, line in enumerate(lines(path, ("input", "outputs"), n_cases)):
            text = line["input"]
            places = [text.rfind(mark) for mark in RULER_MARKS]
            start = next((place for place in places if place >= 0), -1)
            if start < 0:
                raise ValueError(
                    f"input must have a question, after one of {RULER_MARKS}, got none in {path}:{number + 1}"
                )
            context = opening(tokenizer) + encode(tokenizer, text[:start])
            if len(context) > n_tokens:
                raise ValueError(
                    f"context must have at most {n_tokens} tokens, got {len(context)} in {path}:{number + 1}"
                )
            question = encode(tokenizer, text[start:] + line.get("answer_prefix", ""))
            cases.append(
                Case(f"ruler file {task}", number, context, prompts=[Prompt(question, line["outputs"], metric, n_new)])
            )
    return cases


def files(folder: Path) -> list[Path]:
    """All files of JSON lines, in order."""
    paths = sorted(folder.rglob("*.jsonl"))
    if not paths:
        raise ValueError(f"folder must have files of JSON lines, *.jsonl, got {folder}")
    return paths


def lines(path: Path, fields: tuple[str, ...], n_most: int) -> list[dict[str, Any]]:
    """The first `n_most` lines, each with all of `fields`."""
    objects: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text("utf-8").rstrip("\n").split("\n")[:n_most], 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} must be JSON, got: {error}") from error
        missing = [name for name in fields if not isinstance(line, dict) or name not in line]
        if missing:
            raise ValueError(f"{path}:{number} must have the fields {', '.join(fields)}, got none called {missing[0]}")
        objects.append(line)
    return objects


def known(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of LongBench's, if it is there."""
    path = next((path for path in (folder / name, folder / "config" / name) if path.is_file()), None)
    return {} if path is None else json.loads(path.read_text("utf-8"))


def without_middle(tokens: list[int], n_most: int) -> list[int]:
    """At most `n_most` tokens, the first and the last ones."""
    return tokens if len(tokens) <= n_most else tokens[: n_most - n_most // 2] + tokens[len(tokens) - n_most // 2 :]
