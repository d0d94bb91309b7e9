"""Which option of a multiple choice a response states, in the words of models: statements, denials, other languages.

More of what counts as a letter or a word is in test_verifiers.py.
"""

import pytest

from megatron_mcpo.rewards.letters import stated_letter

STATES_B = [
    *("The correct option is (B).", "The correct choice is B.", "the correct answer choice is B", "correct option: B"),
    *(
        "Option B is correct.",
        "Therefore, B is correct.",
        "B is the answer.",
        "(B) is the right answer",
        "**B** is correct",
    ),
    *("Option B is correct. Option C is wrong.", "A is tempting, but B is the best answer."),
    *(
        "The answer would be B.",
        "the answer should be (B)",
        "the answer is clearly B",
        "I choose B.",
        "I'll go with (B)",
    ),
    *(
        "Answer - B",
        "Answer = B",
        "Answer B",
        "### Answer\nB",
        "Final Answer\n\n**B**",
        "Choice: B",
        "Selected option: B",
    ),
    *(
        "It's B.",
        "So B",
        "B\n\nExplanation: because A is wrong",
        "**B**\nBecause of reasons",
        "Answer: {B}",
        "Answer: 'B'",
    ),
    *("Answer：B", "答案：Ｂ", "答案是B", "答案是 (B)", "正确答案是：B", "答案是B因为它", "故选：B。", "選B", "我选B"),
    *("Antwort: B", "Die richtige Antwort ist B, weil", "La réponse est B", "Respuesta: B", "La risposta è B."),
    *('{"answer": "B"}', '{"answer":"B","reason":"A is wrong"}', "{'answer': 'B'}", '```json\n{"Answer": "B"}\n```'),
    *('{"reason": "not A", "answer": "b"}', '{"choice": "B"}', '{\n  "answer": "B) bank",\n  "sure": 0.9\n}'),
    *("Ответ: B", "答え：B", "正解はB", "정답: B", "It is red and the answer is B", r"\boxed{Option B}"),
]
STATES_NONE = [
    *("Neither A nor B is correct.", "A and B is correct", "If B is correct, it rains.", "I don't think B is correct"),
    *("B is incorrect", "B is not correct", "I don't think that option B is correct", "Answer B is wrong"),
    *(
        "The wrong option is B",
        "The option B is wrong",
        "Not the correct option: B",
        "It's B or C",
        "B\nC",
        "B\n\nC. no",
    ),
    *(
        "选项B是错误的",
        "答案不是B",
        "不选B",
        "The correct option is a bank",
        "Options B and C",
        "The answer may be known",
    ),
    *(
        '{"answer": "B or C"}',
        '{"answer": ["B", "C"]}',
        '{"answer": ""}',
        '{"answer": "A bank"}',
        '{"wrong answer": "B"}',
    ),
    *("The correct option is B or C", "答案是B或者C, 答案：B/C", "B is correct only if it rains"),
]


@pytest.mark.parametrize("text", STATES_B)
def test_a_statement_in_other_words_counts(text: str) -> None:
    assert stated_letter(text) == "B"


@pytest.mark.parametrize("text", STATES_NONE)
def test_what_is_denied_or_left_open_does_not(text: str) -> None:
    assert stated_letter(text) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Option A is correct. No: option B is correct.", "B"),
        ("Option A is correct. No: the answer is B.", "B"),
        ("The answer is A. No, B is correct.", "B"),
        (r"B is correct, that is \boxed{C}", "C"),
        (r"\boxed{C}? No, B is correct.", "B"),
        ("The answer is B. A is not correct.", "B"),
    ],
)
def test_the_last_statement_counts_whatever_its_words(text: str, letter: str) -> None:
    assert stated_letter(text) == letter


def test_no_text_takes_more_than_linear_time() -> None:
    for text in (
        "answer is ",
        "or ",
        "B is ",
        "A is the ",
        "option ",
        "答案",
        "answer\n",
        "not think ",
        "'",
        "I ",
        "A\n",
        'answer":"',
        "answer'",
    ):
        stated_letter(text * 50_000)
    for text in ("answer" + " " * 200_000, "\n" * 200_000 + "B", "B\n" + " " * 200_000, "(" * 200_000):
        stated_letter(text)
