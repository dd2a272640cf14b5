"""How right a generated text is, from 0 to 1: metrics of RULER and of LongBench, written from their definitions.

RULER: arXiv:2404.06654. LongBench: arXiv:2308.14508, whose scores are the best over the right answers.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher

__all__ = ["METRICS", "rouge_l"]


def match_all(text: str, answers: list[str]) -> float:
    """Share of the answers that occur in the text, ignoring case."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def match_part(text: str, answers: list[str]) -> float:
    """Whether any answer occurs in the text."""
    return float(any(answer.lower() in text.lower() for answer in answers))


def f1(words: list[str], right: list[str]) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it occurs."""
    n_same = sum((Counter(words) & Counter(right)).values())
    return 2 * n_same / (len(words) + len(right)) if n_same else 0.0


def english_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def chinese_words(text: str) -> list[str]:
    """Words as jieba segments them."""
    try:
        import jieba
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("jieba is not installed, by which Chinese is scored: pip install jieba") from error
    return list(jieba.cut(text))


def chinese_f1(text: str, answer: str) -> float:
    """F1 of words without punctuation and symbols."""

    def cleaned(word: str) -> str:
        return "".join(c for c in word.lower() if unicodedata.category(c)[0] not in "PSZC")

    words, right = ([word for word in map(cleaned, chinese_words(part)) if word] for part in (text, answer))
    return f1(words, right)


def rouge_l(text: str, answer: str) -> float:
    """ROUGE-L as the package `rouge` has it, which LongBench uses; 0 where either is empty.

    Sentences end at full stops. Of each sentence of the answer the distinct words of its longest common subsequences
    with all sentences of the text are counted, a word once in all; F1 of that number against the distinct words.
    """
    sentences, right = (
        [" ".join(part.split()).split(" ") for part in string.split(".") if part] for string in (text, answer)
    )
    if not sentences or not right:
        return 0.0
    shared = {word for sentence in right for other in sentences for word in common_subsequence(sentence, other)}
    n_words, n_right = (len({word for sentence in string for word in sentence}) for string in (sentences, right))
    precision, recall = len(shared) / n_words, len(shared) / n_right
    return 2 * precision * recall / (precision + recall + 1e-8)


def common_subsequence(a: list[str], b: list[str]) -> list[str]:
    """A longest common subsequence; of several, the one found from the end by leaving out words of `b` first."""
    lengths = [[0] * (len(b) + 1)]  # of the first i words of a and the first j of b
    for word in a:
        row, last = [0], lengths[-1]
        for j, other in enumerate(b):
            row.append(last[j] + 1 if word == other else max(last[j + 1], row[j]))
        lengths.append(row)
    i, j, words = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            words.append(a[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words[::-1]


def share_of_numbers(text: str, number: str) -> float:
    """Share of the numbers in the text that are the right one."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def paragraph(text: str, answer: str) -> float:
    """Share of the numbers in the text that are the one in the answer, such as "Paragraph 7"."""
    number = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    if number is None:
        raise ValueError(f"answers must name a paragraph, such as 'Paragraph 7', got {answer!r}")
    return share_of_numbers(text, number[1])


def code_similarity(text: str, answer: str) -> float:
    """Similarity of the first line that is code to the right one, in hundredths, as `fuzz.ratio` has it."""
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100 if line and answer else 0.0


def classification(text: str, answer: str, classes: list[str]) -> float:
    """1 over how many classes the text names if the right one is among them; classes within its name do not count."""
    named = [name for name in classes if name in text and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


def best(score: Callable[[str, str], float], cut: Callable[[str], str] = str) -> Callable[..., float]:
    """The best score over all right answers."""
    return lambda text, answers, classes: max(score(cut(text), answer) for answer in answers)


# Each takes the generated text, the right answers and the classes.
METRICS: dict[str, Callable[[str, list[str], list[str]], float]] = {
    "match all": lambda text, answers, classes: match_all(text, answers),
    "match part": lambda text, answers, classes: match_part(text, answers),
    "F1": best(lambda text, answer: f1(english_words(text), english_words(answer))),
    "F1 of first line": best(lambda text, answer: f1(english_words(text), english_words(answer)), first_line),
    "Chinese F1": best(chinese_f1),
    "ROUGE-L": best(rouge_l),
    "ROUGE-L of first line": best(rouge_l, first_line),
    "Chinese ROUGE-L": best(lambda text, answer: rouge_l(*(" ".join(chinese_words(part)) for part in (text, answer)))),
    "classification": lambda text, answers, classes: max(
        classification(first_line(text), answer, classes) for answer in answers
    ),
    "count": best(share_of_numbers),
    "paragraph": best(paragraph),
    "code similarity": best(code_similarity),
}
