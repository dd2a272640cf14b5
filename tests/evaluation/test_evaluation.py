"""Needles and tasks: the same for everybody, hidden where they say, with answers that can be told from the context."""

import random
import re
from collections import Counter

import pytest
from evaluation_inputs import character_tokenizer, short_text

from kvcluster.evaluation.quality import TASKS, needle_cases, task_case
from kvcluster.evaluation.quality.needles import plant
from kvcluster.evaluation.quality.words import KINDS, SENTENCES
from kvcluster.evaluation.texts import encode

SIZE = {"lengths": [700], "n_contexts": 2, "n_needles": 4, "n_following": 60}


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def text(tokenizer):
    return encode(tokenizer, short_text())


@pytest.fixture(scope="module")
def case(tokenizer, text):
    return needle_cases(tokenizer, text, "reporting", **SIZE)[0]


@pytest.mark.parametrize("kinds", [KINDS, ("digits",), ("words",)])
def test_needles_stand_where_they_say_and_answers_follow_their_questions(tokenizer, text, kinds):
    for case in needle_cases(tokenizer, text, "tuning", **{**SIZE, "lengths": [650, 800]}, kinds=kinds):
        context = tokenizer.decode(case.tokens)
        assert len(case.tokens) in (650, 800)
        assert len(case.following) == 61
        assert Counter(needle.kind for needle in case.needles) == dict.fromkeys(kinds, 4 // len(kinds))
        for needle in case.needles:
            question, answer = tokenizer.decode(needle.question), tokenizer.decode(needle.answer)
            sentence = question.removeprefix("\n\n") + answer
            assert context.count(f" {sentence}. ") == 1
            assert context.index(f" {sentence}. ") == round(needle.depth * len(case.tokens))
            assert question.strip() in SENTENCES["tuning", needle.kind]
            assert re.fullmatch(r"\d{7}" if needle.kind == "digits" else r" [a-z]+ [a-z]+", answer)
        depths = sorted(needle.depth for needle in case.needles)
        assert all(i / 4 < depth < (i + 1) / 4 for i, depth in enumerate(depths))


def test_following_tokens_continue_the_text(tokenizer, text, case):
    rest = tokenizer.decode(case.following)
    last = max(case.needles, key=lambda needle: needle.depth)
    after = tokenizer.decode(case.tokens[round(last.depth * 700) :]).partition(". ")[2]
    assert after + rest in tokenizer.decode(text)


def test_sets_share_no_text_and_no_sentence(tokenizer, text):
    spans = {}
    for which in ("tuning", "reporting"):
        haystack = list(range(4000))  # tokens that tell their place
        cases = needle_cases(tokenizer, haystack, which, **SIZE)
        spans[which] = [{token for token in (*each.tokens, *each.following) if token >= 100} for each in cases]
    every = spans["tuning"] + spans["reporting"]
    assert sum(map(len, every)) == len(set.union(*every))
    for kind in KINDS:
        assert not set(SENTENCES["tuning", kind]) & set(SENTENCES["reporting", kind])


def test_cases_are_the_same_every_time_and_different_from_each_other(tokenizer, text):
    made = [needle_cases(tokenizer, text, which, **SIZE) for which in ("tuning", "tuning", "reporting")]
    assert made[0] == made[1]
    assert len({case.fingerprint for cases in made for case in cases}) == 4
    more = needle_cases(tokenizer, text, "tuning", **{**SIZE, "n_contexts": 3})
    assert more[:2] == made[0]


def test_needles_that_cannot_be_planted_are_refused(tokenizer, text):
    def fails(message, which="tuning", **changed):
        with pytest.raises(ValueError, match=message):
            needle_cases(tokenizer, text, which, **{**SIZE, **changed})

    fails(r"at least 20,547 tokens in its tuning half for 27 contexts of 761, got 20,000", n_contexts=100)
    fails(r"leave room for text beside \d+ tokens of needles, got 100", lengths=[100])
    fails(r"n_needles must be at most 24, got 30", n_needles=30)
    fails(r"n_needles must be at least 1, got 0", n_needles=0)
    fails(r"kinds must be of digits, words, got names", kinds=("names", "words"))
    fails(r"which must be of tuning, reporting, got 'test'", which="test")


@pytest.mark.parametrize("name", TASKS)
def test_tasks_hide_their_answers_and_fit(tokenizer, text, name):
    made = [task_case(name, tokenizer, short_text(), text, "tuning", number, 1800) for number in (0, 0, 1)]
    assert made[0] == made[1]
    assert made[0].fingerprint != made[2].fingerprint
    context, [prompt] = tokenizer.decode(made[0].tokens), made[0].prompts
    assert 1800 - 250 < len(made[0].tokens) <= 1800
    is_shown = name == "common words"  # in an example, of another list
    assert (tokenizer.decode(prompt.question) in context) == is_shown
    for answer in prompt.answers:
        assert answer in context
        assert not any(answer in other for other in prompt.answers if other != answer)
    with pytest.raises(ValueError, match="n_tokens must"):
        task_case(name, tokenizer, short_text(), text, "tuning", 0, 120)
    with pytest.raises(ValueError, match=r"task must be of single, .*, got 'other'"):
        task_case("other", tokenizer, short_text(), text, "tuning", 0, 1800)


def test_answers_of_lists_and_variables_are_true(tokenizer, text):
    def of(name):
        case = task_case(name, tokenizer, short_text(), text, "reporting", 3, 1800)
        return tokenizer.decode(case.tokens), case.prompts[0]

    context, prompt = of("common words")
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", context.partition("The next list:")[2])).most_common()
    assert {word for word, _ in counts[:10]} == set(prompt.answers)
    assert counts[9][1] >= 2 * counts[10][1]
    context, prompt = of("frequent words")
    counts = Counter(context.removeprefix("Coded text:").split()).most_common()
    assert counts[0][0] == "..."
    assert [word for word, _ in counts[1:4]] == prompt.answers
    assert counts[3][1] > counts[4][1]
    context, prompt = of("variable tracking")
    value = re.search(r"value (\d+)", tokenizer.decode(prompt.question))[1]
    found = [re.search(rf"VAR (\w+) = {value}\.", context)[1]]
    while following := re.search(rf"VAR (\w+) = VAR {found[-1]}\.", context):
        assert following.start() > context.index(f"VAR {found[-1]} =")
        found.append(following[1])
    assert found == prompt.answers


def test_a_tokenizer_that_joins_question_and_answer_is_cut_where_they_part(tokenizer, text):
    """One that writes pairs of digits as one token: the pair across the border is the answer's."""

    class Pairs:
        def __call__(self, text, **kwargs):
            pieces = re.findall(r" \d|\d|\D", text)
            return type("Encoding", (), {"input_ids": [sum(map(ord, piece)) for piece in pieces]})

    _, needles, _ = plant(
        Pairs(), [1] * 900, random.Random(0), which="tuning", n_tokens=900, n_needles=2, kinds=("digits",)
    )
    for needle in needles:
        assert len(needle.answer) == 7
        assert needle.answer[0] in range(ord(" ") + ord("0"), ord(" ") + ord("9") + 1)
        assert needle.question[-1] != ord(" ")
