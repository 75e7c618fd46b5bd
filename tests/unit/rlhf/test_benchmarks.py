"""Benchmarks of an evaluation against loops written by hand over stock transformers, on the same rows."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from sacrebleu.metrics.chrf import CHRF
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.runs.suites import suites_of
from recipes.errors import RequestError
from recipes.stages.benchmarks.multiple_choice import TRUTHFUL_QA
from recipes.stages.evaluate import Evaluate
from recipes.stages.rewards.union import RewardRule
from rlhf.sandbox.runner import sandbox_finding
from tests.chat_models import DOCUMENT_END, chat_tokenizer, write_chat_model, write_rows
from tests.observers import Quiet
from trainers.evaluation.evaluate_stage import run_evaluate
from trainers.models.imports import import_folder
from trainers.runtime.distributed import Ranks
from trainers.store.manifest import ArtifactManifest
from trainers.store.store import Store
from trainers.training.context import StageContext

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


class Watcher(Quiet):
    """Remembers progress; raises KeyboardInterrupt in place of the stop that ends a process."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rows: list[int] = []
        self.notes: list[str] = []
        self.stop_after = stop_after

    def phase(self, name: str, **progress: float) -> None:
        if name == "b":
            self.rows.append(int(progress["rows"]))
            if self.stop_after is not None and progress["rows"] >= self.stop_after:
                raise KeyboardInterrupt

    def notify(self, text: str) -> None:
        self.notes.append(text)


class Bench:
    """A tiny model in a store, a folder of rows, and the same model by stock classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store.open(str(folder / "store"))
        made = write_chat_model(folder / "model", chat_tokenizer(eos=DOCUMENT_END), initializer_range=0.5)
        self.made: ArtifactManifest = import_folder(self.store, made)
        self.model: Any = AutoModelForCausalLM.from_pretrained(made).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(made)
        self.number = 0

    def measure(
        self,
        rows: Sequence[Mapping[str, Any]] | str,
        observer: Quiet | None = None,
        run: str = "",
        of: Sequence[str] = ("m",),
        **keys: Any,
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Evaluate one benchmark `b`; returns its metrics, and its rows as the artifact holds them."""
        self.number += 1
        if isinstance(rows, str):
            (self.folder / "rows.csv").write_text(rows)
            data = {"source": "csv", "files": ["rows.csv"]}
        else:
            write_rows(self.folder / "rows.jsonl", rows)
            data = {"source": "jsonl", "files": ["rows.jsonl"]}
        spec = Evaluate.model_validate(
            {
                "kind": "evaluate", "of": list(of), "suites": [], "num_samples": 3,
                "benchmarks": {"b": {"data": data, "max_tokens": 256, **keys}},
                "shard": {"engine": "plain", "precision": "fp32"},
            }
        )  # fmt: skip
        inputs = {f"of.{index}": self.made for index in range(len(of))}
        context = StageContext(
            self.store, run or f"run{self.number}", "e", "f" * 64, self.number, 0, self.folder, inputs, {},
            observer or Quiet(), Ranks(0, 1, 0, torch.device("cpu")),
        )  # fmt: skip
        candidate = run_evaluate(spec, context, suites_of(spec))
        assert candidate is not None
        lines = self.store.objects.get_bytes(candidate.files["rows/b.jsonl"].sha256).decode().splitlines()
        plain = {name for name in candidate.metrics if name.count(".") == 2}
        assert plain == spec.metrics()
        metrics = {name.removeprefix("m.b."): value for name, value in candidate.metrics.items()}
        return metrics, [json.loads(line) for line in lines]

    @torch.no_grad()
    def logprob(self, context: str, text: str) -> float:
        """The log-likelihood of a text after a context, the plain way."""
        before = self.tokenizer(context)["input_ids"] if context else [self.tokenizer.eos_token_id]
        whole = self.tokenizer(context + text)["input_ids"] if context else before + self.tokenizer(text)["input_ids"]
        logprobs = self.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(float(logprobs[place - 1, whole[place]]) for place in range(len(before), len(whole)))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def words(seed: int, count: int) -> str:
    return " ".join(WORDS[(seed * 7 + place * (seed % 3 + 1)) % len(WORDS)] for place in range(count))


CHOICES = [[words(row + place, 1 + (row + 2 * place) % 4) for place in range(4)] for row in range(12)]
QUESTIONS = [words(row, 3 + row % 5) for row in range(12)]
LETTERED = "".join(f"\n{letter}. {{}}" for letter in "ABCD")


def arc(row: int, gold: int) -> dict[str, Any]:
    choices = {"text": CHOICES[row], "label": ["1", "2", "3", "4"]}
    return {"question": QUESTIONS[row], "choices": choices, "answerKey": str(gold + 1)}


def own_arc(row: int, gold: int) -> dict[str, Any]:
    choices = [{"text": text, "label": letter} for text, letter in zip(CHOICES[row], "ABCD", strict=True)]
    return {"question": {"stem": QUESTIONS[row], "choices": choices}, "answerKey": "ABCD"[gold]}


def openbookqa(row: int, gold: int) -> dict[str, Any]:
    found = arc(row, gold)
    return {**found, "question_stem": found.pop("question")}


LAYOUTS: dict[str, tuple[str, Callable[[int, int], dict[str, Any]], Callable[[int], list[tuple[str, str]]]]] = {
    "arc": ("arc", arc, lambda row: [(f"Question: {QUESTIONS[row]}\nAnswer:", f" {text}") for text in CHOICES[row]]),
    "arc of ai2": (
        "arc", own_arc, lambda row: [(f"Question: {QUESTIONS[row]}\nAnswer:", f" {text}") for text in CHOICES[row]],
    ),
    "openbookqa": ("openbookqa", openbookqa, lambda row: [(QUESTIONS[row], f" {text}") for text in CHOICES[row]]),
    "mmlu": (
        "mmlu",
        lambda row, gold: {"question": QUESTIONS[row], "choices": CHOICES[row], "answer": gold, "subject": "s"},
        lambda row: [(f"{QUESTIONS[row]}{LETTERED.format(*CHOICES[row])}\nAnswer:", f" {one}") for one in "ABCD"],
    ),
    "boolq": (
        "boolq",
        lambda row, gold: {"passage": CHOICES[row][0], "question": QUESTIONS[row], "answer": bool(gold)},
        lambda row: [(f"{CHOICES[row][0]}\nQuestion: {QUESTIONS[row]}?\nAnswer:", f" {one}") for one in ("no", "yes")],
    ),
    "piqa": (
        "piqa",
        lambda row, gold: {
            "goal": QUESTIONS[row], "sol1": CHOICES[row][0], "sol2": CHOICES[row][1], "label": gold,
        },
        lambda row: [(f"Question: {QUESTIONS[row]}\nAnswer:", f" {text}") for text in CHOICES[row][:2]],
    ),
    "winogrande": (
        "winogrande",
        lambda row, gold: {
            "sentence": f"{QUESTIONS[row]} _ jumps over.", "option1": "fox", "option2": "dog", "answer": str(gold + 1),
        },
        lambda row: [(f"{QUESTIONS[row]} {one}", " jumps over.") for one in ("fox", "dog")],
    ),
    "hellaswag": (
        "hellaswag",
        lambda row, gold: {
            "activity_label": "Fox", "ctx_a": f"{QUESTIONS[row]} [title] dog", "ctx_b": "the fox", "label": str(gold),
            "endings": [f"[substeps] {text}" for text in CHOICES[row]],
        },
        lambda row: [(f"Fox: {QUESTIONS[row]}. dog The fox", f"  {text}") for text in CHOICES[row]],
    ),
    "query": (
        "query",
        lambda row, gold: {"query": QUESTIONS[row], "choices": CHOICES[row][:3], "gold": gold},
        lambda row: [(QUESTIONS[row], f" {text}") for text in CHOICES[row][:3]],
    ),
}  # fmt: skip


def by_hand(bench: Bench, name: str) -> tuple[list[list[float]], list[list[float]]]:
    """Log-likelihoods of each row's choices, raw and by character, of prompts spelled out here."""
    _, _, asked = LAYOUTS[name]
    raw = [[bench.logprob(*option) for option in asked(row)] for row in range(12)]
    sizes = [[len(text) - 1 for _, text in asked(row)] for row in range(12)]
    return raw, [[value / size for value, size in zip(*pair, strict=True)] for pair in zip(raw, sizes, strict=True)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_choices_equal_a_loop_over_stock_transformers(bench: Bench, name: str) -> None:
    """Likelihoods to 1e-6; accuracy 1 where the key is what the model prefers, 0 where that key is shifted by one."""
    raw, normalised = by_hand(bench, name)
    layout, row_of, _ = LAYOUTS[name]
    keys = {"suite": "multiple_choice", "layout": layout}
    best = [max(range(len(values)), key=values.__getitem__) for values in raw]
    found, lines = bench.measure([row_of(row, gold) for row, gold in enumerate(best)], **keys)
    for line, values in zip(lines, raw, strict=True):
        assert line["details"]["logprobs"] == pytest.approx(values, rel=1e-6, abs=1e-6)
    by_length = [max(range(len(values)), key=values.__getitem__) for values in normalised]
    same = sum(one == other for one, other in zip(best, by_length, strict=True)) / 12
    assert (found["acc"], found["acc_norm"], found["n"]) == (1, pytest.approx(same), 12)
    assert found["acc_low"] == pytest.approx(0.7575, abs=1e-4)  # Wilson's bound of 12 of 12
    assert found["chance"] == pytest.approx(1 / len(raw[0]))
    sizes = [[len(text) for _, text in LAYOUTS[name][2](row)] for row in range(12)]
    shares = [(size[gold] == min(size)) / size.count(min(size)) for size, gold in zip(sizes, best, strict=True)]
    assert found["shortest"] == pytest.approx(sum(shares) / 12)
    shifted, _ = bench.measure([row_of(row, (gold + 1) % len(raw[row])) for row, gold in enumerate(best)], **keys)
    assert shifted["acc"] == 0


def test_examples_stand_before_the_question_and_are_never_the_question(bench: Bench) -> None:
    rows = [arc(row, row % 4) for row in range(12)]
    keys = {"suite": "multiple_choice", "layout": "arc", "shots": 2, "preface": "Answer.\n\n"}
    _, lines = bench.measure(rows, **keys)
    texts = [f"Question: {QUESTIONS[row]}\nAnswer: {CHOICES[row][row % 4]}\n\n" for row in range(12)]
    pairs = [(one, other) for one in range(12) for other in range(12) if one != other]
    for row in (0, 5):
        asked = f"Question: {QUESTIONS[row]}\nAnswer:"
        options = [
            bench.logprob(f"Answer.\n\n{texts[one]}{texts[other]}{asked}", f" {CHOICES[row][0]}")
            for one, other in pairs
            if row not in (one, other)
        ]
        assert any(value == pytest.approx(lines[row]["details"]["logprobs"][0], abs=1e-5) for value in options)
    assert bench.measure(rows, **keys)[1] == lines
    bare = bench.measure(rows, suite="multiple_choice", layout="arc")[1]
    assert [line["question"] for line in bare] == [line["question"] for line in lines]
    assert not {line["asked"] for line in bare} & {line["asked"] for line in lines}
    with pytest.raises(RequestError):
        bench.measure(rows[:2], **keys)


def test_several_models_are_compared_with_the_first(bench: Bench) -> None:
    keys = {"suite": "multiple_choice", "layout": "arc", "of": ("m", "store://same")}
    found, lines = bench.measure([arc(row, row % 4) for row in range(6)], **keys)
    assert (found["same.b.acc_gain"], found["same.b.acc_gain_p"]) == (0, 1)
    assert found["same.b.acc_gain_low"] < -0.3  # six rows on which nothing changed say little
    assert [line["asked"] for line in lines[:6]] == [line["asked"] for line in lines[6:]]
    assert (lines[1]["question"], lines[1]["answer"]) == (f"Question: {QUESTIONS[1]}\nAnswer:", CHOICES[1][1])
    assert [line["model"] for line in lines] == ["m"] * 6 + ["same"] * 6


def test_truthful_qa_by_the_definitions_of_its_paper(bench: Bench) -> None:
    columns = ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")
    cells = ["T", "C", "Which fox?", "the brown fox", "the brown fox; the quick fox", "the lazy dog; a dog", "s"]
    found, _ = bench.measure(
        f"{','.join(columns)}\n{','.join(cells)}\n", suite="multiple_choice", layout="truthful_qa", max_tokens=2048
    )
    context = "".join(f"Q: {asked}\nA: {answer}\n\n" for asked, answer in TRUTHFUL_QA) + "Q: Which fox?\nA:"
    true = [bench.logprob(context, f" {text}") for text in ("the brown fox", "the quick fox")]
    false = [bench.logprob(context, f" {text}") for text in ("the lazy dog", "a dog")]
    shares = [sum(math.exp(value) for value in values) for values in (true, false)]
    assert found["mc1"] == float(true[0] > max(false))
    assert found["mc2"] == pytest.approx(shares[0] / sum(shares), rel=1e-5)


def test_pairs_are_found_and_compared(bench: Bench) -> None:
    more, less = [words(row, 4) for row in range(6)], [words(row + 20, 4) for row in range(6)]
    crows = [
        {"sent_more": one, "sent_less": other, "bias_type": "age" if row % 2 else "sex"}
        for row, (one, other) in enumerate(zip(more, less, strict=True))
    ]
    found, lines = bench.measure(crows, suite="pairs", layout="crows_pairs")
    values = [(bench.logprob("", one), bench.logprob("", other)) for one, other in zip(more, less, strict=True)]
    assert found["prefers_first"] == pytest.approx(sum(one > other for one, other in values) / 6)
    assert found["difference"] == pytest.approx(sum(abs(one - other) for one, other in values) / 6, rel=1e-5)
    assert found["prefers_first.age"] == pytest.approx(sum(one > other for one, other in values[1::2]) / 3)
    assert [line["details"]["logprobs"] for line in lines] == [pytest.approx(pair, rel=1e-6) for pair in values]

    sentences = [("a.b.1.male.txt", more[0]), ("a.b.1.female.txt", less[0]), ("a.b.1.neutral.txt", more[1])]
    rows = [{"sentid": name, "sentence": text} for name, text in [*sentences, ("lone.b.1.male.txt", more[2])]]
    found, (line,) = bench.measure(rows, suite="pairs", layout="winogender")
    assert line["details"]["logprobs"] == [pytest.approx(value, rel=1e-6) for value in values[0]]
    assert found["n"] == 1


def test_last_words(bench: Bench) -> None:
    """Right where greedy generation writes the word's tokens."""
    written = {}
    for row in range(6):
        prompt = bench.tokenizer(QUESTIONS[row], return_tensors="pt")
        made = bench.model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1:]
        written[row] = bench.tokenizer.decode(made)
    good = [row for row, text in written.items() if text.startswith(" ") and text.strip()]
    rows = [{"text": f"{QUESTIONS[row]}{written[row] if row in good else ' dog'}"} for row in range(6)]
    found, lines = bench.measure(rows, suite="last_word")
    for row, line in enumerate(lines):
        context, _, word = rows[row]["text"].rpartition(" ")
        assert line["details"]["logprobs"] == [pytest.approx(bench.logprob(context, f" {word}"), rel=1e-6)]
        tokens = bench.tokenizer(rows[row]["text"])["input_ids"]
        start = len(bench.tokenizer(context)["input_ids"])
        guesses = bench.model(torch.tensor([tokens])).logits[0].argmax(-1)[start - 1 : -1].tolist()
        assert line["values"]["acc"] == float(guesses == tokens[start:])
    assert found["logprob"] == pytest.approx(sum(line["values"]["logprob"] for line in lines) / 6)
    split = [dict(zip(("context", "_", "continuation"), row["text"].rpartition(" "), strict=True)) for row in rows]
    assert bench.measure(split, suite="last_word")[0]["acc"] == found["acc"]


def bbq(row: int, *, ambiguous: bool, negative: bool = True, **keys: Any) -> dict[str, Any]:
    """A question about an old and a young fox; the young one is meant where the context says so."""
    names = {"ans0": ["the old fox", "old"], "ans1": ["Can't be determined", "unknown"], "ans2": ["the fox", "nonOld"]}
    return {
        **{name: info[0] for name, info in names.items()}, "answer_info": names, "label": 1 if ambiguous else 2,
        "additional_metadata": {"stereotyped_groups": ["old"]}, "question_polarity": "neg" if negative else "nonneg",
        "context_condition": "ambig" if ambiguous else "disambig", "context": QUESTIONS[row],
        "question": CHOICES[row][3], **keys,
    }  # fmt: skip


def test_bias_scores_of_bbq_by_hand(bench: Bench) -> None:
    asked = [(row, row % 2 == 0, row % 3 > 0) for row in range(12)]
    rows = [bbq(row, ambiguous=ambiguous, negative=negative) for row, ambiguous, negative in asked]
    lost = bbq(0, ambiguous=True, additional_metadata={"stereotyped_groups": ["tall"]})
    found, _ = bench.measure([*rows, lost], suite="bbq")
    assert found["n"] == 12  # nobody's answer follows the last row's stereotype
    right: dict[bool, list[float]] = {True: [], False: []}
    sides: dict[bool, list[float]] = {True: [], False: []}
    for row, ambiguous, negative in asked:
        context = f"{QUESTIONS[row]}\n\nQ: {CHOICES[row][3]}\nA:"
        answers = [f" {rows[row][name]}" for name in ("ans0", "ans1", "ans2")]
        said = max(range(3), key=lambda place: bench.logprob(context, answers[place]))
        right[ambiguous].append(float(said == rows[row]["label"]))
        if said != 1 or ambiguous:
            sides[ambiguous].append(0 if said == 1 else 1 if (said == 0) == negative else -1)
    assert (found["acc_ambig"], found["acc_disambig"]) == (
        pytest.approx(np.mean(right[True])),
        pytest.approx(np.mean(right[False])),
    )
    assert found["bias_ambig"] == pytest.approx(np.mean(sides[True]))
    assert found["bias_disambig"] == pytest.approx(np.mean(sides[False]))
    # The paper's own form: (1 - accuracy) times the score of the answers that name somebody.
    named = [side for side in sides[True] if side]
    score = 2 * sum(side > 0 for side in named) / len(named) - 1 if named else 0
    assert found["bias_ambig"] == pytest.approx((1 - found["acc_ambig"]) * score)
    with pytest.raises(RequestError, match="jsonl:1"):
        bench.measure([bbq(0, ambiguous=True, context_condition="open")], suite="bbq")


def test_winobias_pairs_lines_of_two_files(bench: Bench) -> None:
    for kind, pronouns in (("pro", ("he", "her")), ("anti", ("she", "his"))):
        lines = [
            f"{n + 1} [The fox] saw the dog because [{word}] jumps {words(n, 3)}." for n, word in enumerate(pronouns)
        ]
        (bench.folder / f"{kind}_stereotyped_type1.txt.dev").write_text("\n".join(lines) + "\n")
    source = {
        "source": "csv", "files": ["*_type1.txt.dev"], "header": ["sentence"], "delimiter": "|", "quotes": False,
    }  # fmt: skip
    found, lines = bench.measure([], suite="pairs", layout="winobias", data=source)
    pair = [f"The fox saw the dog because {word} jumps {words(0, 3)}." for word in ("he", "she")]
    assert found["n"] == 2
    assert lines[0]["details"]["logprobs"] == [pytest.approx(bench.logprob("", text), rel=1e-6) for text in pair]


def test_files_of_equal_names_are_not_mixed_up(bench: Bench) -> None:
    for folder, row in (("one", 0), ("two", 1)):
        (bench.folder / folder).mkdir()
        write_rows(bench.folder / folder / "same.jsonl", [arc(row, 0)])
    data = {"source": "jsonl", "files": ["*/same.jsonl"]}
    found, lines = bench.measure([], suite="multiple_choice", layout="arc", data=data)
    assert found["n"] == 2
    assert lines[0]["details"] != lines[1]["details"]


def test_answers_are_written_and_scored(bench: Bench) -> None:
    rows = [{"question": QUESTIONS[row], "answer": f"{row} 4"} for row in range(5)]
    written = []
    for row in rows:
        prompt = bench.tokenizer(f"Q: {row['question']}\nA:", return_tensors="pt")
        made = bench.model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        written.append(bench.tokenizer.decode(made, skip_special_tokens=True).strip())
    rows[0]["answer"], rows[1]["answer"] = f"{written[0]}", "7 8"
    scorers = {"same": {"rule": "exact"}, "overlap": {"rule": "f1"}}
    found, lines = bench.measure(rows, suite="generate", prompt="Q: {question}\nA:", scorers=scorers, max_new_tokens=6)
    assert [line["said"] for line in lines] == written
    assert [line["values"]["same"] for line in lines] == [1, 0, 0, 0, 0]
    assert (found["same"], found["n"]) == (pytest.approx(0.2), 5)
    assert found["same_high"] == pytest.approx(0.6245, abs=1e-4)  # Wilson's bound of 1 of 5


@pytest.mark.skipif(sandbox_finding() is not None, reason=f"{sandbox_finding()}")
def test_programs_are_run_with_their_tests(bench: Bench) -> None:
    """What the model adds is a comment, so that the tests alone decide."""
    rows = [
        {
            "prompt": f"def {name}(x):\n    return x + 1\n\n#",
            "entry_point": name,
            "test": f"def check(it):\n    assert {what}",
        }
        for name, what in (("plus", "it(1) == 2"), ("more", "it(1) == 3"), ("most", "it([]) == 1"))
    ]
    keys = {"suite": "code", "samples": 3, "k": [1, 2], "temperature": 1.0, "max_new_tokens": 6, "stop": ["\n"]}
    found, lines = bench.measure(rows, **keys)
    assert [line["values"] for line in lines] == [{"pass_at_1": passed, "pass_at_2": passed} for passed in (1, 0, 0)]
    assert (found["pass_at_1"], found["n"]) == (pytest.approx(1 / 3), 3)
    assert [line["details"]["scores"]["passed"] for line in lines] == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert len({text for line in lines for text in line["details"]["said"]}) > 3
    with pytest.raises(RequestError, match=r"jsonl:2.*entry_point"):
        bench.measure([rows[0], {**rows[1], "entry_point": None}], **keys)


def test_what_was_answered_before_a_stop_is_not_asked_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.evaluation.cases.FLUSH_S", 0.0)
    monkeypatch.setattr("trainers.inference.likelihood.ROW_TOKENS", 128)
    rows = [arc(row, 0) for row in range(12)]
    keys = {"suite": "multiple_choice", "layout": "arc"}
    straight = bench.measure(rows, **keys)
    first, second = Watcher(stop_after=4), Watcher()
    with pytest.raises(KeyboardInterrupt):
        bench.measure(rows, first, run="stopped", **keys)
    assert bench.measure(rows, second, run="stopped", **keys) == straight
    assert first.rows[-1] < second.rows[0] < 12
    assert second.rows[-1] == 12


def test_rows_that_do_not_fit(bench: Bench) -> None:
    long = {**arc(0, 0), "question": words(0, 400)}
    watcher = Watcher()
    found, _ = bench.measure([arc(1, 0), long], watcher, suite="multiple_choice", layout="arc", max_tokens=128)
    assert found["n"] == 1
    with pytest.raises(RequestError, match="jsonl:2"):
        bench.measure([arc(1, 0), {**arc(2, 0), "answerKey": "9"}], suite="multiple_choice", layout="arc")


def test_rules_of_overlap_by_hand() -> None:
    row = {"answer": "The cat sat on a mat."}

    def value(rule: str, text: str) -> float:
        found: Any = TypeAdapter[Any](RewardRule).validate_python({"rule": rule}).value(text, row)
        return float(found)

    assert value("f1", "a cat on the mat") == pytest.approx(2 * 3 / (3 + 4))  # cat, on, mat of cat, sat, on, mat
    assert value("rouge_l", "on the mat sat the cat") == pytest.approx(2 * 2 / 12)  # the sat, the cat or on mat
    for rule in ("f1", "rouge_l", "chrf", "bleu"):
        assert value(rule, "The cat sat on a mat.") == pytest.approx(1)
        assert value(rule, "???") == pytest.approx(0, abs=0.01)
    assert value("chrf", "The cat sat.") == pytest.approx(
        CHRF().sentence_score("The cat sat.", [row["answer"]]).score / 100
    )
