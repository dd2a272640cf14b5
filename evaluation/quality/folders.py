"""Cases from files that the user has: LongBench's and RULER's JSON lines. Nothing is downloaded.

Each line is split where its question begins, which the cache must not see.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvcluster.fast.outside import json_of, shown

from ..errors import UnusableInputError
from ..texts import encode, opening, read_text
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


def is_text(value: object) -> bool:
    """Whether a value is a string of characters: JSON can spell half of a surrogate pair, which is none."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def are_answers(value: object) -> bool:
    return are_texts(value) and value != []


def are_classes(value: object) -> bool:
    return value is None or are_texts(value)


# What a value must be, and the test of it.
Rule = tuple[str, Callable[[object], bool]]
TEXT: Rule = "a string", is_text
ANSWERS: Rule = "a list of strings, at least one", are_answers
CLASSES: Rule = "a list of strings or null", are_classes
LENGTH: Rule = "a whole number, at least 1", is_length
LONGBENCH_FIELDS = {"input": TEXT, "context": TEXT, "answers": ANSWERS, "all_classes": CLASSES}
RULER_FIELDS = {"input": TEXT, "outputs": ANSWERS}


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
    prompts = known(folder, "dataset2prompt.json", TEXT)
    lengths = known(folder, "dataset2maxlen.json", LENGTH)
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
        for number, line in enumerate(lines(path, LONGBENCH_FIELDS, n_cases)):
            question = after.replace("{input}", line["input"])
            prompt = Prompt(
                encode(tokenizer, question or "\n"),
                line["answers"],
                metric,
                lengths.get(dataset, n_new),
                line["all_classes"] or [],
            )
            read = encode(tokenizer, before.replace("{input}", "") + line["context"])
            context = without_middle(opening(tokenizer) + read, n_tokens)
            check_length(context, n_tokens, f"{path}:{number + 1}")
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
        for number, line in enumerate(lines(path, RULER_FIELDS, n_cases)):
            text = line["input"]
            places = [text.rfind(mark) for mark in RULER_MARKS]
            start = next((place for place in places if place >= 0), -1)
            if start < 0:
                raise ValueError(
                    f"input must have a question, after one of {RULER_MARKS}, got none in {path}:{number + 1}"
                )
            context = opening(tokenizer) + encode(tokenizer, text[:start])
            check_length(context, n_tokens, f"{path}:{number + 1}")
            prefix = line.get("answer_prefix", "")
            check(prefix, f"{path}:{number + 1}", "answer_prefix", TEXT)
            question = encode(tokenizer, text[start:] + prefix)
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


def lines(path: Path, fields: Mapping[str, Rule], n_most: int) -> list[dict[str, Any]]:
    """The first `n_most` lines, each with all of `fields`."""
    objects: list[dict[str, Any]] = []
    for number, text in enumerate(read_text(path, "file").rstrip("\n").split("\n")[:n_most], 1):
        line = json_of(text, f"{path}:{number}")
        missing = [name for name in fields if not isinstance(line, dict) or name not in line]
        if missing:
            raise UnusableInputError(
                f"{path}:{number} must have the fields {', '.join(fields)}, got none called {missing[0]}"
            )
        for name, rule in fields.items():
            check(line[name], f"{path}:{number}", name, rule)
        objects.append(line)
    return objects


def known(folder: Path, name: str, rule: Rule) -> dict[str, Any]:
    """A JSON file of LongBench's, if it is there: an object whose values are all of one kind."""
    path = next((path for path in (folder / name, folder / "config" / name) if path.is_file()), None)
    if path is None:
        return {}
    content = json_of(read_text(path, "file"), str(path))
    if not isinstance(content, dict):
        raise UnusableInputError(f"{path} must be an object, got {shown(content)}")
    for dataset, value in content.items():
        check(value, str(path), dataset, rule)
    return content


def check_length(context: list[int], n_most: int, where: str) -> None:
    """Refuse a context that is empty or too long."""
    if not context:
        raise UnusableInputError(f"context must have a token, got none in {where}")
    if len(context) > n_most:
        raise UnusableInputError(f"context must have at most {n_most} tokens, got {len(context)} in {where}")


def check(value: object, where: str, name: str, rule: Rule) -> None:
    """Refuse what the field `name` of a file must not be."""
    words, is_right = rule
    if not is_right(value):
        raise UnusableInputError(f"{name} must be {words}, got {shown(value)} in {where}")


def without_middle(tokens: list[int], n_most: int) -> list[int]:
    """At most `n_most` tokens, the first and the last ones."""
    return tokens if len(tokens) <= n_most else tokens[: n_most - n_most // 2] + tokens[len(tokens) - n_most // 2 :]
