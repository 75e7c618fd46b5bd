"""What the text of an input means."""

import pytest

from recipes.references import FolderRef, HubRef, Reference, StageRef, StoreRef, parse_reference


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
