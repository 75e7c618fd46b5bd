"""Adapters with modules that learn whole, on the head and the embedding, by patterns: trained, verified, exported to
stock peft, taken in again, continued from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from recipes.errors import Preempted, RequestError
from recipes.stages.finetune import Finetune
from recipes.stages.lora import Lora
from recipes.stages.pretrain import Pretrain
from tests.integration.rlhf.workshop import CPU, WORDS, Listener, Workshop, jsonl, open_workshop, sizes_of
from trainers.data.tokenizer import load_tokenization
from trainers.models.decoder import build_decoder
from trainers.models.folders import write_model
from trainers.models.grown import add_tokens, learn_only
from trainers.models.imports import import_folder, import_merged
from trainers.models.lora import add_adapter, fill_adapter
from trainers.models.protocol import TokenizerFacts
from trainers.models.stack import load_exact
from trainers.models.token_losses import token_losses
from trainers.store.adapters import find_stack, weights_of
from trainers.store.export import export
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store
from trainers.tasks.language_model import run_language_model
from trainers.tasks.language_start import build_stage_model

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")

TOKENS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))
TRAIN = {
    "steps": 4, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 1e-2}, "evaluation_rows": 4,
    "save_every": 2,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("tied", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "mlp.up_proj"]}),
    "untied": (
        "untied",
        {
            "modules_to_save": ["lm_head", "embed_tokens"],
            "target_modules": r".*\.(self_attn\.(q|v)_proj|mlp\.down_proj)",
            "rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 6},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "experts": (
        "moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"],
            "modules_to_save": ["lm_head"],
        },
    ),
    "pissa": ("untied", {"init": "pissa", "rank_pattern": {"down_proj": 2}, "modules_to_save": ["lm_head"]}),
    "olora": ("untied", {"init": "olora", "target_modules": ["q_proj", "lm_head"]}),
    "ends": ("untied", {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "rank_stabilised": True}),
}


def tune_spec(start: str, lora: dict[str, Any] | None, precision: str = "fp32", **settings: Any) -> Finetune:
    return Finetune.model_validate(
        {
            "kind": "finetune",
            "init_from": start,
            "lora": None if lora is None else {"r": 4, "alpha": 8, **lora},
            **settings,
            "data": {"source": "jsonl", "files": ["answers.jsonl"], "hold_out": 0.2},
            "train": TRAIN,
            "shard": {"engine": "plain", "precision": precision},
        }
    )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Bases in bf16: head and embedding are one tensor, are two, and a mixture of experts."""
    made = open_workshop(tmp_path_factory.mktemp("modules"), width=32)
    pairs = [{"prompt": f"What is {a}?", "completion": f"{a} {b}."} for a in WORDS for b in WORDS]
    jsonl(made.folder / "answers.jsonl", pairs)
    facts = TokenizerFacts(made.tokenization.vocab_size, made.tokenization.eos_id, made.tokenization.pad_id)
    shared = {"max_position_embeddings": 128, **sizes_of(32)}
    types = {
        "tied": {"type": "llama", "tie_word_embeddings": True},
        "untied": {"type": "llama"},
        "moe": {
            "type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
            "head_dim": 16, "num_key_value_heads": 2, "decoder_sparse_step": 1,
        },
    }  # fmt: skip
    for name, keys in types.items():
        model: Any = build_decoder({**shared, **keys}, facts, seed=1, device=CPU)
        files = made.tokenization.files()
        given = (model.config, model.named_parameters(), files)
        write_model(made.folder / name / "model", "language_model", *given, dtype=torch.bfloat16)
        entries = made.store.objects.put_folder(made.folder / name)
        digest = files_digest(entries)
        manifest = ArtifactManifest(fingerprint=digest, digest=digest, kind="model", stage=name, files=entries)
        made.made[name] = made.store.put_artifact(manifest).manifest
    return made


def tuned(workshop: Workshop, name: str, start: str, lora: dict[str, Any], precision: str = "fp32") -> ArtifactManifest:
    """Train, verify and commit, once."""
    if name not in workshop.made:
        given = {"init_from": start}
        candidate = run_language_model(tune_spec(start, lora, precision), workshop.context(name, given))
        workshop.keep(name, candidate, given)
    return workshop.made[name]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS, use_cache=False).logits
    return found


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.std()))


@pytest.mark.parametrize("case", list(CASES))
def test_stock_peft_opens_what_is_exported(workshop: Workshop, case: str, tmp_path: Path) -> None:
    base, lora = CASES[case]
    made = tuned(workshop, f"{case}-fp32", base, lora)
    folder = export(workshop.store, made, tmp_path / "adapter")
    opened = PeftModel.from_pretrained(stock(folder / "base"), str(folder))
    merged = stock(workshop.store.folder(made, "model"))
    assert_same(logits(opened), logits(merged))
    assert (logits(merged) - logits(stock(folder / "base"))).abs().max() > 1e-2
    held = load_file(folder / "adapter_model.safetensors")
    ends = {key for key in held if "embed_tokens" in key or "lm_head" in key}
    assert ends
    assert all(held[key].any() for key in ends)
    assert (case in ("ends", "olora")) == all("lora_" in key for key in ends)
    ranks = {len(tensor) for key, tensor in held.items() if key.endswith("q_proj.lora_A.weight")}
    assert (case in ("pissa", "olora")) == (ranks == {8})
    assert (case == "experts") == any("experts.base_layer.lora_B" in key for key in held)


@pytest.mark.parametrize("case", ["tied", "untied", "experts"])
def test_a_peft_folder_is_taken_in_and_merged(workshop: Workshop, case: str, tmp_path: Path) -> None:
    base, lora = CASES[case]
    made = tuned(workshop, f"{case}-fp32", base, lora)
    folder = export(workshop.store, made, tmp_path / "adapter")
    other = Store.open(str(tmp_path / "store"))
    merged = export(other, import_folder(other, folder), tmp_path / "merged", merge=True)
    wanted = stock(workshop.store.folder(made, "model"))
    for parameter in wanted.parameters():  # merged files are in the base's bf16; buffers are not in files
        parameter.data = parameter.data.bfloat16().float()
    found, rounded = logits(stock(merged)), logits(wanted)
    torch.testing.assert_close(found, rounded, rtol=0, atol=1e-4 * float(rounded.std()))


def test_a_pair_that_peft_trained_apart_is_tied_no_longer(workshop: Workshop, tmp_path: Path) -> None:
    made = tuned(workshop, "tied-fp32", *CASES["tied"])
    folder = export(workshop.store, made, tmp_path / "adapter")
    held = load_file(folder / "adapter_model.safetensors")
    head = next(key for key in held if "lm_head" in key)
    held[head] = held[head] + 0.1
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    wanted = logits(PeftModel.from_pretrained(stock(folder / "base"), str(folder)))
    other = Store.open(str(tmp_path / "store"))
    taken = import_folder(other, folder)
    found = find_stack(other, taken, (*taken.lies_on, taken.digest))
    assert found is not None
    assert_same(logits(load_exact(found, "language_model", device=CPU)), wanted)
    merged = export(other, taken, tmp_path / "merged", merge=True)
    torch.testing.assert_close(logits(stock(merged)), wanted, rtol=0.1, atol=0.05 * float(wanted.std()))


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_a_stage_continues_from_modules_that_learned(workshop: Workshop, case: str, tmp_path: Path) -> None:
    base, lora = CASES[case]
    tuned(workshop, f"{case}-bf16", base, lora, "bf16")
    more = {"modules_to_save": ["lm_head"]} if case == "untied" else {}
    made = tuned(workshop, f"{case}-more", f"{case}-bf16", more, "bf16")
    assert made.stack == [workshop.made[name].digest for name in (base, f"{case}-bf16")]
    folder = export(workshop.store, made, tmp_path / "adapter")
    opened = PeftModel.from_pretrained(stock(folder / "base"), str(folder))
    live = load_exact(weights_of(workshop.store, made), "language_model", device=CPU)
    assert_same(logits(opened), logits(live))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_dora_adapter_of_peft_learns_on_as_the_same_adapter(
    workshop: Workshop, precision: str, tmp_path: Path
) -> None:
    dora: dict[str, Any] = {"dora": True, "target_modules": ["q_proj", "up_proj"]}
    first = export(workshop.store, tuned(workshop, f"dora-{precision}", "untied", dora, precision), tmp_path / "first")
    name = f"peft-{precision}"
    workshop.made[name] = import_merged(workshop.store, import_folder(workshop.store, first), "mine")
    start = logits(PeftModel.from_pretrained(stock(first / "base"), str(first)))
    spec = tune_spec(name, dora, precision)
    model, weights = build_stage_model(spec, workshop.context("seen", {"init_from": name}), workshop.tokenization)
    assert spec.lora is not None
    assert weights is not None
    assert weights.continued is not None
    add_adapter(model, spec.lora, seed=0)
    fill_adapter(model, weights.continued)
    assert_same(logits(model), start)
    made = tuned(workshop, f"{name}-more", name, dora, precision)
    assert made.lies_on == (workshop.made["untied"].digest,)
    second = export(workshop.store, made, tmp_path / "second")
    assert (
        load_file(second / "adapter_model.safetensors").keys() == load_file(first / "adapter_model.safetensors").keys()
    )
    opened = logits(PeftModel.from_pretrained(stock(second / "base"), str(second)))
    assert (opened - start).abs().max() > 1e-2
    if precision == "fp32":
        assert_same(opened, logits(stock(workshop.store.folder(made, "model"))))
    assert_same(opened, logits(load_exact(weights_of(workshop.store, made), "language_model", device=CPU)))


@pytest.mark.parametrize("other", [{"r": 2}, {"target_modules": ["q_proj"]}, {"dora": False}])
def test_an_adapter_of_another_form_is_a_new_one(workshop: Workshop, other: dict[str, Any]) -> None:
    dora: dict[str, Any] = {"dora": True, "target_modules": ["q_proj", "up_proj"]}
    tuned(workshop, "dora-bf16", "untied", dora, "bf16")
    spec, context = tune_spec("dora-bf16", {**dora, **other}), workshop.context("new", {"init_from": "dora-bf16"})
    _, weights = build_stage_model(spec, context, workshop.tokenization)
    assert weights is not None
    assert weights.continued is None


def test_a_stopped_stage_ends_in_the_same_bytes(workshop: Workshop) -> None:
    class Stopping(Listener):
        def stop_requested(self) -> bool:
            return any(line.get("step", 0) >= 2 for _, line in self.phases)

    base, lora = CASES["tied"]
    straight = tuned(workshop, "tied-fp32", base, lora)
    context = workshop.context("stopped", {"init_from": base})
    object.__setattr__(context, "observer", Stopping())
    with pytest.raises(Preempted):
        run_language_model(tune_spec(base, lora), context)
    resumed = run_language_model(tune_spec(base, lora), workshop.context("stopped", {"init_from": base}))
    assert resumed is not None
    assert files_digest(resumed.files) == straight.digest


@pytest.mark.parametrize("lora", [{"init": "pissa"}, {"init": "pissa", "init_iterations": 8}, {"init": "olora"}])
def test_a_start_from_the_weights_is_the_base_and_learns_its_main_directions(
    workshop: Workshop, lora: dict[str, Any]
) -> None:
    folder = workshop.store.folder(workshop.made["untied"], "model")
    model, plain = stock(folder), logits(stock(folder))
    add_adapter(model, Lora.model_validate({"r": 4, "target_modules": ["q_proj"], **lora}), seed=3)
    assert_same(logits(model), plain)
    layer = model.model.layers[0].self_attn.q_proj
    weight, factors = layer.base_layer.weight, (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    assert layer.lora_A["default"].weight.requires_grad
    assert not layer.lora_A["origin"].weight.requires_grad
    with torch.no_grad():
        rest = weight - layer.scaling["default"] * factors[0] @ factors[1]
    if lora["init"] == "pissa":  # what is left is the next singular value (Eckart & Young 1936); drawn, a bit more
        found, least = float(torch.linalg.matrix_norm(rest, ord=2)), float(torch.linalg.svdvals(weight)[4])
        assert (1 - 1e-5) * least <= found <= (1.05 if "init_iterations" in lora else 1 + 1e-5) * least
    with pytest.raises(RequestError):
        add_adapter(stock(folder), Lora.model_validate({"r": 40, "target_modules": ["q_proj"], **lora}), seed=3)


def test_the_loss_of_an_adapted_head_is_that_of_its_logits(workshop: Workshop) -> None:
    made = tuned(workshop, "ends-fp32", *CASES["ends"])
    folder = workshop.store.folder(made, "adapter")
    base = workshop.store.folder(workshop.made["untied"], "model")
    model: Any = PeftModel.from_pretrained(stock(base), str(folder)).base_model.model
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    found = token_losses(model, TOKENS, mask.long(), torch.arange(24).expand(2, 24), mask)
    wanted = torch.nn.functional.cross_entropy(
        logits(model)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("start", "lora"),
    [
        ("tied", {"target_modules": ["lm_head"]}),
        ("tied", {"target_modules": r".*embed_tokens"}),
        ("untied", {"target_modules": r"decoder\..*"}),
        ("untied", {"modules_to_save": ["wte"]}),
        ("untied", {"target_parameters": ["experts.down_proj"]}),
        ("untied", {"modules_to_save": ["q_proj"], "target_modules": ["q_proj"]}),
    ],
)
def test_what_cannot_be_trained_so_is_refused(workshop: Workshop, start: str, lora: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        run_language_model(tune_spec(start, lora), workshop.context("refused", {"init_from": start}))


def test_new_tokens_get_rows_and_the_rest_stays_frozen(workshop: Workshop) -> None:
    tokens = ["<|open|>", "<|shut|>"]
    spec = tune_spec("tied", None, new_tokens=tokens, trainable=[r"model\.embed_tokens"])
    given = {"init_from": "tied"}
    workshop.keep("grown", run_language_model(spec, workshop.context("grown", given)), given)
    folder = workshop.store.folder(workshop.made["grown"], "model")
    before = load_file(workshop.store.folder(workshop.made["tied"], "model") / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    rows = workshop.tokenization.vocab_size
    changed = {key for key in after if not torch.equal(after[key][: len(before[key])], before[key].float())}
    assert changed == {"model.embed_tokens.weight"}
    assert after["model.embed_tokens.weight"].shape[0] == rows + 2 == stock(folder).config.vocab_size
    known = load_tokenization(folder)
    assert known.encode("a<|open|>b<|shut|>").count(rows) == 1
    assert [known.token_id(token) for token in tokens] == [rows, rows + 1]
    grown: Any = stock(workshop.store.folder(workshop.made["untied"], "model"))
    add_tokens(grown, rows, rows + 2)
    for module in (grown.get_input_embeddings(), grown.get_output_embeddings()):
        torch.testing.assert_close(module.weight[rows:], module.weight[:rows].mean(dim=0).expand(2, -1))
    with pytest.raises(RequestError):
        learn_only(grown, ["lm_head", "embedder"])


def test_a_model_starts_again_from_random_weights(workshop: Workshop) -> None:
    given = {
        "kind": "pretrain", "init_from": "untied", "reset_weights": True, "train": TRAIN,
        "data": {"source": "jsonl", "files": ["answers.jsonl"], "hold_out": 0.2},
        "shard": {"engine": "plain", "precision": "fp32"},
    }  # fmt: skip
    spec, context = Pretrain.model_validate(given), workshop.context("again", {"init_from": "untied"})
    (found, _), (same, _) = (build_stage_model(spec, context, workshop.tokenization) for _ in range(2))
    assert_same(logits(found), logits(same))
    assert (logits(found) - logits(stock(workshop.store.folder(workshop.made["untied"], "model")))).abs().max() > 1e-2
