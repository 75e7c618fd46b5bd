"""What the text of an input means."""

import pytest

from recipes.data.text import JsonLines, PythonDocs, PythonSummaries, Source
from recipes.references import FolderRef, HubRef, Reference, StageRef, StoreRef, parse_reference
from recipes.stages.answers import SourceUse
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import Finetune
from recipes.stages.optim import AdamW
from recipes.stages.train import Train


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("chat", StageRef("chat")),
        ("policy.critic", StageRef("policy", "critic")),
        ("a-b_2", StageRef("a-b_2")),
        ("store://chat", StoreRef("chat")),
        ("store://policy.actor", StoreRef("policy", "actor")),
        ("store://0123abcd", StoreRef("0123abcd")),
        ("store://" + "a" * 64 + ".critic", StoreRef("a" * 64, "critic")),
        ("./model", FolderRef("./model")),
        ("../a/b", FolderRef("../a/b")),
        ("/data/model", FolderRef("/data/model")),
        ("models/x", FolderRef("models/x")),
        (".", FolderRef(".")),
        ("hf://org/name@main", HubRef("org/name", "main")),
        ("hf://gpt2@607a30d783df", HubRef("gpt2", "607a30d783df")),
        ("hf://Qwen/Qwen3-0.6B@v1.0", HubRef("Qwen/Qwen3-0.6B", "v1.0")),
    ],
)  # fmt: skip
def test_what_a_reference_means(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text",
    [
        "", " chat", "chat ", "Chat", "chat.", ".chat", "a.b.c", "${HOME}", "$(x)", "~/m", "~", "file:///etc/passwd",
        "http://169.254.169.254/latest", "s3://bucket/x", "store://", "store://A", "store://../x", "hf://a/b",
        "hf://a/b/c@main", "hf://../x@main", "hf://a/b@", "os.system", "x\x00y", "store://abc/def",
    ],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    try:
        reference = parse_reference(text)
    except ValueError:
        return
    assert isinstance(reference, StageRef), "only a stage's name may look like this, and no stage has it"


VALIDATION, TEST = (PythonDocs(source="python-docs", split=split) for split in ("validation", "test"))
DOCS = PythonDocs(source="python-docs", limit=3, part="1/2")
SUMMARIES = PythonSummaries(source="python-docs-summaries")
LINES = JsonLines(source="jsonl", files=["a"])
KEPT = JsonLines(source="jsonl", files=["a"], hold_out=0.1)


@pytest.mark.parametrize(
    ("data", "evaluation", "expected"),
    [
        (DOCS, None, (VALIDATION, False)),
        (SUMMARIES, None, (SUMMARIES.model_copy(update={"split": "validation"}), False)),
        (LINES, SUMMARIES, (SUMMARIES, False)),
        (VALIDATION, None, (TEST, False)),
        (TEST, None, None),
        (LINES, None, None),
        (LINES, DOCS, (DOCS, False)),
        (KEPT, None, (KEPT, True)),
        (KEPT, DOCS, (DOCS, False)),
        (LINES, KEPT, (KEPT, True)),
    ],
)
def test_a_stage_is_never_evaluated_on_rows_that_it_learns_from(
    data: Source, evaluation: Source | None, expected: tuple[Source, bool] | None
) -> None:
    train = Train(steps=1, global_batch=1, sequence_length=8, optimizer=AdamW(lr=1e-3))
    stage = Finetune(kind="finetune", init_from="base", data=data, evaluation=evaluation, train=train)
    found = stage.find_source("evaluation")
    is_derived = evaluation is None
    assert found == (expected and SourceUse("evaluation", expected[0], "instructions", expected[1], is_derived))


@pytest.mark.parametrize(("source", "is_held_out"), [(None, False), (DOCS, False), (LINES, False), (KEPT, True)])
def test_an_evaluation_reads_the_rows_that_are_kept_away_from_training(
    source: Source | None, is_held_out: bool
) -> None:
    evaluation = Evaluate(kind="evaluate", of=["chat"], text=source, prompts=source)
    assert [(use.field_path, use.role, use.held_out) for use in evaluation.sources()] == [
        ("text", "text", is_held_out),
        ("prompts", "prompts", is_held_out),
    ]
    targets = Evaluate(kind="evaluate", of=["chat"], suites=["targets"], prompts=source)
    assert targets.sources() == [SourceUse("prompts", source or TEST, "seq2seq", held_out=is_held_out)]
