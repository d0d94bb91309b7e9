"""Thoughts and <answer>: what verifiers get of a response, through the scorer, the vote and the decoder of tokens.

Real parts: the scorer's workers, reasoning-gym's scorers, the tokenizer of the quick start's model with tags and
templates as thinking models have them. Not covered: such a model itself.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.domain_schema import DomainConfig
from megatron_mcpo.data.conversation import PromptMaker
from megatron_mcpo.data.item_pools import Pool
from megatron_mcpo.data.row_statistics import RowStatistics
from megatron_mcpo.data.rows import Item
from megatron_mcpo.data.tokenizer import load_tokenizer
from megatron_mcpo.rewards.registry import stated_answer
from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.rewards.thoughts import final_answer, opened_thoughts
from megatron_mcpo.rollout.decoding import ResponseDecoder
from megatron_mcpo.types import Prompt
from tests.support.data_configs import make_config
from tests.support.paths import EMBEDDED_MODEL
from tests.support.scoring import completion, config_of, group

THOUGHTS = "<think>\nIt may be 5: \\boxed{5}, <answer>5</answer> or A.\n```python\nprint(5)\n```\n</think>\n\n"

FINAL = [
    ("6", "6"),
    (f"{THOUGHTS}6", "6"),
    ("so\n</think>\n6", "6"),
    ("<think>a</think>6<think>b</think> 7", "7"),
    ("<think>it is 6", ""),
    ("<think>it is 6</think>", ""),
    ("It is 6. <think>Is it?", "It is 6."),
    ("<think>a</think>6 <think>no, 7", "6"),
    ("<answer> 6 </answer>", "6"),
    ("<think>5</think>I say <answer>6</answer>.", "6"),
    ("<answer>5</answer> no: <answer>6</answer>", "6"),
    ("<Answer>6</Answer>", "6"),
    ("<answer>6", "6"),
    ("6</answer>", "6"),
    ("<answer>6</answer><answer>", "6"),
    ("<answer></answer> 6", ""),
    ("<think><answer>6</answer></think>", ""),
    ("<reasoning>5</reasoning>\n<answer>\n6\n</answer>", "6"),
    ("[THINK]5[/THINK]6", "6"),
    ("<thinking>5</thinking>6", "6"),
    ("1 < think > 0", "1 < think > 0"),
]


@pytest.mark.parametrize(("response", "final"), FINAL)
def test_what_is_judged_is_the_answer_behind_the_thoughts(response: str, final: str) -> None:
    assert final_answer(response) == final
    assert final_answer(final) == final


def test_tags_in_great_number_take_linear_time() -> None:
    assert final_answer("<think></think><answer>" * 50_000 + "6") == "6"
    assert final_answer("<answer>" * 100_000) == ""


@cache
def generated(name: str) -> dict[str, Any]:
    entry: dict[str, Any] = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
    assert entry["metadata"]["source_dataset"] == name
    return entry


GENERATORS = (
    "chain_sum",
    "count_bits",
    "letter_counting",
    "syllogism",
    "needle_haystack",
    "simple_equations",
    "word_sequence_reversal",
)
ITEMS: dict[str, dict[str, Any]] = {
    **{kind: {"verifier": kind, "answer": "6"} for kind in ("math", "numeric", "exact", "text")},
    "choice": {"verifier": "choice", "answer": "B"},
    "code": {"verifier": "code", "tests": [{"input": "", "output": "6"}]},
    **{name: {"verifier": "reasoning_gym", **generated(name)} for name in GENERATORS},
}
WRONG = {"choice": "A"}


def answers(name: str) -> tuple[str, str]:
    """Return a right and a wrong final answer to an item of ITEMS."""
    if name == "code":
        return "print(6)", "print(5)"
    return str(ITEMS[name]["answer"]), WRONG.get(name, "5")


@pytest.fixture(scope="module")
def rows() -> Any:
    with Scorer(config_of([{}], rewards={"workers": 2, "timeout": 60.0})) as scorer:
        yield scorer


@pytest.mark.parametrize("name", sorted(ITEMS))
def test_no_verifier_sees_thoughts_and_all_see_the_answer(name: str, rows: Scorer) -> None:
    right, wrong = answers(name)
    shown = [
        right,
        f"{THOUGHTS}{right}",
        f"so {wrong}</think>{right}",
        f"{THOUGHTS}It is\n<answer>\n{right}\n</answer>",
    ]
    if name != "code":
        shown += [f"\\boxed{{{right}}}", f"{THOUGHTS}\\boxed{{{right}}}"]
    tempting = f"<think>{right}\n\\boxed{{{right}}}\n```python\n{right}\n```\n"
    refused = [wrong, f"{tempting}</think>{wrong}", f"{tempting}</think>", tempting, f"{tempting}</think>I don't know."]
    refused += [f"{tempting}<answer>{right}</answer>", f"{tempting}</think><answer>{wrong}</answer>"]
    [scored] = rows.score([group(*shown, *refused, **ITEMS[name])])
    assert scored.error is None
    assert dict(zip([*shown, *refused], scored.rewards, strict=True)) == dict.fromkeys(shown, 1.0) | dict.fromkeys(
        refused, 0.0
    )


def test_form_is_judged_on_the_whole_response_and_the_answer_on_the_rest() -> None:
    verifiers = [{"kind": "exact"}, {"kind": "format", "pattern": r"(?s)<think>.*</think>.*"}]
    with Scorer(config_of([{"verifiers": verifiers}])) as scorer:
        [scored] = scorer.score([group("<think>x</think>right", "right", "<think>right</think>", "<think>right")])
    assert scored.rewards == (1.0, 0.5, 0.5, 0.0)
    assert scored.correct == (True, True, False, False)


@pytest.mark.parametrize("kind", ["math", "numeric", "exact", "text", "choice", "code", "reasoning_gym", ""])
def test_the_vote_is_on_what_is_judged(kind: str) -> None:
    assert stated_answer(kind, f"{THOUGHTS}<answer>B 6</answer>") == stated_answer(kind, "B 6")
    assert stated_answer(kind, THOUGHTS) == ""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    if not EMBEDDED_MODEL.exists():
        pytest.skip(f"{EMBEDDED_MODEL} is missing: make model")
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    return loaded


def decoded(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> str:
    prompt_ids, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
    made = Prompt(domain=0, source="s", index=0, token_ids=tuple(prompt_ids), entry={})
    [text] = ResponseDecoder(tokenizer).texts(made, [replace(completion(""), token_ids=tuple(ids))])
    return text


@pytest.mark.parametrize("special", [True, False])
def test_tags_are_kept_whatever_they_are_in_the_vocabulary(tokenizer: PreTrainedTokenizerBase, special: bool) -> None:
    tags = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>"]
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": tags})
    response = "<think>so A</think><answer>B</answer><|im_end|>"
    assert decoded(tokenizer, "q", response) == "<think>so A</think><answer>B</answer>"
    assert (decoded(tokenizer, "q", "a<tool_call>b") == "ab") == special


def test_other_texts_are_decoded_as_transformers_does_without_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = "  Größe 数学 🤖: don ' t , 1 , 2 !\n\n<|im_start|>assistant\n\\boxed{6} <|endoftext|> x<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert decoded(tokenizer, "q", text) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("opened", ["<think>\n", "<think>", "<think>\n\n", "<|im_start|>assistant\n", "</think>\n\n"])
def test_thoughts_that_the_template_opened_belong_to_the_response(
    tokenizer: PreTrainedTokenizerBase, opened: str, special: bool
) -> None:
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    begins = opened if opened.startswith("<think>") else ""
    assert (
        decoded(tokenizer, f"<|im_start|>user\nUse <think>.<|im_end|>\n{opened}", "6</think>7") == f"{begins}6</think>7"
    )
    assert final_answer(decoded(tokenizer, opened, "it is 6")) == ("" if begins else "it is 6")


def test_a_prompt_that_ends_otherwise_opens_nothing() -> None:
    assert [opened_thoughts(text) for text in ("", "<think>a", "<think></think>", "think>")] == [""] * 4


def prompt_text(tokenizer: PreTrainedTokenizerBase, values: dict[str, Any]) -> str:
    domain = DomainConfig.model_validate({"name": "d", "sources": [{"file": "rows.jsonl"}]})
    maker = PromptMaker(domain, 0, tokenizer, max_tokens=100, template_values=values)
    item = Item(position=0, messages=({"role": "user", "content": "q"},), entry={"question": "q", "answer": "1"})
    statistics = RowStatistics(domain="d", source="s", place=str, rows=1)
    [prompt] = maker.prompts(Pool(name="s", items=[item], row_statistics=statistics), [item], [])
    return str(tokenizer.decode(prompt.token_ids))


THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}"
)
"""It ends as the templates of Qwen3 and of models distilled from DeepSeek-R1 do."""


def test_values_for_the_chat_template_reach_it(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = THINKING_TEMPLATE
    asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(tokenizer, {}) == f"{asked}<think>\n"
    assert prompt_text(tokenizer, {"enable_thinking": False}) == f"{asked}<think>\n\n</think>\n\n"


def test_a_name_that_the_chat_template_does_not_take_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = THINKING_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    config = make_config({"name": "d", "sources": [{"file": "rows.jsonl"}]})
    given = {"enable_thinking": False, "enable_think": True, "tokenize": True, "messages": []}
    data = config.data.model_copy(update={"chat_template_kwargs": given})
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path)}), "data": data})
    with pytest.raises(ConfigError) as refused:
        load_tokenizer(config)
    assert refused.value.problems == [
        "data.chat_template_kwargs.enable_think = True: must be a variable of the model's chat template (it has no "
        "such name). Correct the name, or remove it",
        "data.chat_template_kwargs.tokenize = True: must be a variable of the model's chat template (is set by the "
        "run). Correct the name, or remove it",
        "data.chat_template_kwargs.messages = []: must be a variable of the model's chat template (is set by the run). "
        "Correct the name, or remove it",
    ]
