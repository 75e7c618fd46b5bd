"""Plain text put to a chat model: turns of its template, and targets that are the assistant's words alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from recipes.data.text import Source
from recipes.data.tokenizers import TrainTokenizer
from recipes.errors import RequestError
from trainers.data.conversation import as_conversation, turns
from trainers.data.dataset import Dataset
from trainers.data.encoding import TextSettings
from trainers.data.layouts.registry import text_layout
from trainers.data.materialise import DataRequest, materialise
from trainers.data.template import response_spans
from trainers.data.tokenizer import Tokenization, train_tokenizer
from trainers.store.store import Store

ADAPTER: TypeAdapter[Any] = TypeAdapter(Source)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>"]
USER = {"role": "user", "content": "Return the sum?"}
ANSWER = {"role": "assistant", "content": "Open a file."}
HH = "\n\nHuman: Return the sum?\n\nAssistant: Of what?\n\nHuman: Of a and b.\n\nAssistant:"


@pytest.fixture(scope="module")
def chatml() -> Tokenization:
    spec = TrainTokenizer(
        train="bpe", vocab_size=320, special_tokens=MARKS[:1], eos_token=MARKS[1], chat_template=CHATML
    )
    return train_tokenizer(spec, ["Return the sum of two numbers. Open a file and read its lines."] * 2)


@pytest.fixture
def build(tmp_path: Path, store: Store, chatml: Tokenization) -> Any:
    def build(role: Any, row: Any, template: Any = "chat", **changes: Any) -> Dataset:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        source = ADAPTER.validate_python({"source": "jsonl", "files": ["rows.jsonl"]})
        return materialise(
            DataRequest(
                source, tmp_path, text_layout(role, TextSettings(chatml, 128, template=template, **changes)), 0
            ),
            store,
        )

    return build


def packed(dataset: Dataset, tokens: Tokenization) -> tuple[str, str]:
    """Return the text of the only sequence, and that of its targets."""
    ids, mask = dataset.arrays["input_ids"][0], dataset.arrays["loss_mask"][0]
    used = np.asarray(ids)[np.asarray(dataset.arrays["segment_ids"][0]) > 0]
    return tokens.decode(used, skip_special=False), tokens.decode(np.asarray(ids)[mask], skip_special=False)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Return the sum?", "completion": "Open a file."},
        {"prompt": [USER], "completion": "Open a file."},
        {"messages": [USER, ANSWER]},
    ],
)
def test_a_prompt_and_its_completion_are_turns_and_the_answer_alone_is_learned(
    build: Any, chatml: Tokenization, row: Any
) -> None:
    whole, learned = packed(build("instructions", row), chatml)
    assert whole == "<|im_start|>user\nReturn the sum?<|im_end|>\n<|im_start|>assistant\nOpen a file.<|im_end|>"
    assert learned == "Open a file.<|im_end|>"


def test_template_none_joins_the_columns(build: Any, chatml: Tokenization) -> None:
    whole, learned = packed(build("instructions", {"prompt": "Return", "completion": " a sum."}, "none"), chatml)
    assert whole == "Return a sum.<|im_end|>"
    assert learned == " a sum.<|im_end|>"


def test_the_line_break_after_a_turn_is_nobodys(build: Any, chatml: Tokenization) -> None:
    whole, learned = packed(build("instructions", {"messages": [USER, ANSWER, USER, ANSWER]}), chatml)
    assert learned == "Open a file.<|im_end|>" * 2
    assert whole.endswith("Open a file.<|im_end|>")


def test_blanks_of_a_template_without_an_end_token_stay_with_the_turn() -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    text, spans = response_spans(plain, [USER, ANSWER], {}, ("<end>",))
    assert [text[start:end] for start, end in spans] == ["assistant: Open a file.\n"]


@pytest.mark.parametrize("prompt", ["Return the sum?", [USER]])
def test_both_answers_of_a_pair_end_with_their_turn(build: Any, chatml: Tokenization, prompt: Any) -> None:
    dataset = build("preferences", {"prompt": prompt, "chosen": "Open a file.", "rejected": "Read its lines."})
    for side, answer in (("chosen", "Open a file."), ("rejected", "Read its lines.")):
        ids, is_response = (np.asarray(dataset.arrays[f"{side}_{name}"]) for name in ("ids", "response"))
        assert chatml.decode(ids[is_response], skip_special=False) == f"{answer}<|im_end|>"
        assert list(ids[~is_response]) == chatml.encode_prompt([USER])


def test_a_prompt_of_text_is_asked_as_a_user_asks(build: Any, chatml: Tokenization) -> None:
    dataset = build("prompts", {"prompt": "Return the sum?", "completion": "Open a file."})
    assert list(dataset.cut("prompt_ids", 0)) == chatml.encode_prompt([USER])
    assert dataset.records[0]["prompt"] == [USER]
    assert dataset.records[0]["reference"] == "Open a file."
    assert (
        dataset.digest != build("prompts", {"prompt": "Return the sum?", "completion": "Open a file."}, "none").digest
    )


def test_marked_dialogues_become_the_turns_that_they_mark(build: Any, chatml: Tokenization) -> None:
    dialogue = [USER, {"role": "assistant", "content": "Of what?"}, {"role": "user", "content": "Of a and b."}]
    assert turns(HH) == dialogue
    dataset = build("preferences", {"chosen": f"{HH} Open a file.", "rejected": f"{HH} Read its lines."})
    ids, is_response = (np.asarray(dataset.arrays[f"chosen_{name}"]) for name in ("ids", "response"))
    assert list(ids[~is_response]) == chatml.encode_prompt(dialogue)
    assert chatml.decode(ids[is_response], skip_special=False) == "Open a file.<|im_end|>"
    asked = as_conversation({"prompt": f"{HH} Open a file.", "reference": None})
    assert asked == {"prompt": dialogue, "reference": "Open a file."}


def test_a_pair_of_texts_whose_prompt_is_not_known_is_refused(build: Any) -> None:
    row = {"chosen": "Return the sum.", "rejected": "Return the file."}
    with pytest.raises(RequestError, match=r"rows.jsonl:1: 'chosen' and 'rejected' .*'prompt'"):
        build("preferences", row)
    assert len(build("preferences", row, "none")) == 1


def test_a_row_of_one_text_has_no_turns(build: Any, chatml: Tokenization) -> None:
    assert packed(build("instructions", {"text": "Open a file."}), chatml)[0] == "Open a file.<|im_end|>"
