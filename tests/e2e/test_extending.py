"""docs/extending.md, performed: a data source, an evaluation suite, a kind of stage and an algorithm
join a copy of the tree by the files that the page names, and recipes that use them run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from recipes.errors import Preempted
from recipes.loading.yaml_text import parse_yaml
from trainers.store.store import Store

PROJECT = Path(__file__).resolve().parents[2]
ADDED = Path(__file__).with_name("additions")
"""New files, each where it belongs in the tree."""
PACKAGES = ("recipes", "trainers", "rlhf", "launch", "cluster")


SOURCE = '''

class Yaml(_Rows, Patterns):
    """YAML documents, one a row."""

    source: Literal["yaml"] = meaning(description="Reads YAML files with a document for each row.")
'''

SAPO = """class Sapo(Comparisons):
    \"\"\"SAPO (Gao et al. 2025, arXiv 2511.20347): GRPO with soft gates instead of clipping.\"\"\"

    name: Literal["sapo"] = meaning(description="Advantages: as grpo; ratios lose weight gradually.")
    positive: float = meaning(1.0, gt=0, le=100, description="Temperature of the gate for positive advantages.")
    negative: float = meaning(1.05, gt=0, le=100, description="Temperature of the gate for negative advantages.")


"""


CASE = """        case Sapo():
            gate = partial(soft_gate, positive=settings.positive, negative=settings.negative)
            return compared(settings, GroupRelative("group"), gate, aggregation=sequence_mean)
"""


FLOW_CASE = """        case Flow():
            from trainers.models.images.flow import FlowFamily

            return FlowFamily(architecture, facts)
"""

NEW: list[tuple[str, str]] = []
"""The whole file is new, and lies in `ADDED`."""

# By section of the page, by file: the text before each addition, and the addition.
ADDITIONS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "A data source": {
        "recipes/data/text.py": [
            ('description="Reads Apache Parquet files.")\n', SOURCE),
            ("Source = Annotated[\n    ", "Yaml | "),
        ],
        "trainers/data/sources/yaml_files.py": NEW,
        "trainers/data/sources/open.py": [
            (
                "from trainers.data.sources.text import TextReader\n",
                "from trainers.data.sources.yaml_files import YamlReader\n",
            ),
            ("from recipes.data.text import (\n", "    Yaml,\n"),
            ("    match source:\n", "        case Yaml():\n            return YamlReader(source, base_dir)\n"),
        ],
    },
    "An evaluation suite": {
        "recipes/stages/suites.py": [
            ("SuiteName = Literal[", '"next_token", '),
            (
                "SUITES: dict[SuiteName, SuiteSpec] = {\n",
                '    "next_token": SuiteSpec("language models", ("next_token",), source=("text", "text")),\n',
            ),
        ],
        "recipes/models/decoder.py": [("    suites=(", '"next_token", ')],
        "trainers/evaluation/suites/next_token.py": NEW,
        "launch/runs/suites.py": [
            (
                "from trainers.evaluation.suite import Measured, Parts, Suite\n",
                "from trainers.evaluation.suites.next_token import measure_next_token\n",
            ),
            ("MEASURES: dict[SuiteName, Suite] = {\n", '    "next_token": measure_next_token,\n'),
        ],
    },
    "A kind of stage": {
        "recipes/stages/distill.py": NEW,
        "recipes/stages/kinds.py": [
            ("from recipes.stages.base import StageBase\n", "from recipes.stages.distill import Distill\n"),
            ("Stage = Annotated[\n    ", "Distill | "),
            ("SEMANTICS = {", '"distill": 1, '),
        ],
        "trainers/tasks/distillation.py": NEW,
        "launch/runs/stage_entry.py": [
            (
                "from recipes.stages.training_stage import ImageTraining, TextTraining\n",
                "from recipes.stages.distill import Distill\n",
            ),
            (
                "    match spec:\n",
                "        case Distill():\n"
                "            from trainers.tasks.distillation import run_distill\n\n"
                "            return run_distill(spec, context)\n",
            ),
        ],
    },
    "An algorithm of reinforcement learning": {
        "recipes/stages/algorithms.py": [
            ("warmup=min(self.critic.warmup, small.iterations - 1)))\n\n\n", SAPO),
            ("TextAlgorithm = Annotated[\n    ", 'Annotated[Sapo, Tag("sapo")]\n    | '),
        ],
        "rlhf/algorithms/soft_gate.py": NEW,
        "rlhf/algorithm.py": [
            ("from recipes.stages.algorithms import (\n", "    Sapo,\n"),
            (
                "from rlhf.algorithms.ratios import LogRatios, mean_log_ratios, product_log_ratios, token_log_ratios\n",
                "from rlhf.algorithms.soft_gate import soft_gate\n",
            ),
            ("    match settings:\n", CASE),
        ],
    },
    "A family of image models": {
        "recipes/models/images/flow.py": NEW,
        "recipes/models/images/architecture.py": [
            ("from recipes.models.images.ddpm import Ddpm\n", "from recipes.models.images.flow import Flow\n"),
            ("ImageArchitecture = Annotated[", "Flow | "),
        ],
        "trainers/models/images/flow.py": NEW,
        "trainers/models/images/families.py": [
            ("from recipes.models.images.ddpm import Ddpm\n", "from recipes.models.images.flow import Flow\n"),
            ("    match architecture:\n", FLOW_CASE),
        ],
        "recipes/image/flow.yaml": NEW,
    },
}

RECIPE: dict[str, Any] = {
    "name": "extended",
    "stages": {
        "early": {
            "kind": "pretrain",
            "architecture": {
                "family": "decoder", "type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64,
                "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
                "max_position_embeddings": 128,
            },
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "data": {"source": "yaml", "files": ["rows.yaml"], "hold_out": 0.2},
            "train": {"steps": 2, "global_batch": 4, "sequence_length": 64, "optimizer": {"lr": 1e-3}},
        },
        "base": {
            "kind": "pretrain", "init_from": "early",
            "data": {"source": "yaml", "files": ["rows.yaml"], "hold_out": 0.2},
            "train": {
                "steps": 30, "global_batch": 4, "sequence_length": 64, "optimizer": {"lr": 1e-2},
                "schedule": {"name": "constant"},
            },
        },
        "taught": {
            "kind": "distill", "init_from": "early", "teacher": "base", "temperature": 2.0,
            "data": {"source": "yaml", "files": ["rows.yaml"], "hold_out": 0.2},
            "train": {
                "steps": 200, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 1e-2},
                "schedule": {"name": "constant"}, "save_every": 20, "evaluate_every": 100,
            },
        },
        "measured": {
            "kind": "evaluate", "of": ["base", "taught"], "suites": ["perplexity", "next_token"],
            "sequence_length": 64,
            "text": {"source": "yaml", "files": ["rows.yaml"], "hold_out": 0.2},
            "gates": [{"metric": "base.next_token", "min": 0.1}],
        },
        "reward": {
            "kind": "reward", "init_from": "base", "lora": {"r": 4}, "min_accuracy": 0,
            "data": {"source": "jsonl", "files": ["pairs.jsonl"], "hold_out": 0.3},
            "train": {"steps": 10, "global_batch": 4, "sequence_length": 64, "optimizer": {"lr": 1e-2}},
        },
        "policy": {
            "kind": "rl", "actor": "base", "rewards": {"judge": {"model": "reward"}}, "lora": {"r": 4},
            "prompts": {"source": "jsonl", "files": ["pairs.jsonl"]},
            "rollout": {
                "prompts_per_iteration": 4, "samples_per_prompt": 4, "max_prompt_tokens": 48, "max_new_tokens": 16,
            },
            "algorithm": {"name": "sapo", "iterations": 2, "optimizer": {"lr": 1e-2}},
        },
    },
    "cluster": {"workers": 1, "gpus_per_worker": 0},
}  # fmt: skip


def files_of(section: str) -> set[str]:
    """The files that the page names for an addition."""
    page = (PROJECT / "docs" / "extending.md").read_text()
    (part,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return set(re.findall(r"^\| `([\w/.]+)` \|", part, re.MULTILINE))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with all additions."""
    folder = tmp_path_factory.mktemp("extended") / "tree"
    for package in PACKAGES:
        shutil.copytree(PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for additions in ADDITIONS.values():
        for name, edits in additions.items():
            path = folder / name
            if edits is NEW:
                shutil.copyfile(ADDED / name, path)
            for before, added in edits:
                text = path.read_text()
                assert before in text, f"{name} has no {before!r}"
                path.write_text(text.replace(before, before + added, 1))
    return folder


@pytest.mark.parametrize("section", ADDITIONS)
def test_an_addition_takes_the_files_that_the_page_names(section: str) -> None:
    assert files_of(section) == set(ADDITIONS[section])
    assert sum(not name.endswith(".yaml") for name in ADDITIONS[section]) <= 4  # and the recipe


class Commands:
    """Commands of the extended tree, called next to the recipe."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.folder = folder
        self._environment = {**os.environ, "PYTHONPATH": str(tree), "TRAINWRIGHT_STORE": str(folder / "store")}

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a command."""
        return subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *arguments], env=self._environment, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *arguments: str) -> str:
        """Run a command to its successful end; returns what it prints."""
        process = self.start(*arguments)
        out, errors = process.communicate(timeout=400)
        assert process.returncode == 0, out + errors
        return out

    @property
    def store(self) -> Store:
        """Where its runs are."""
        return Store.open(str(self.folder / "store"))


@pytest.fixture(scope="module")
def finished(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """A recipe that uses every addition: checked, planned, run, stopped in the new kind of stage and resumed."""
    call = Commands(tree, tmp_path_factory.mktemp("recipe"))
    rows = [{"text": " ".join(f"{word} and {word + 1}" for word in range(row, row + 12))} for row in range(60)]
    (call.folder / "rows.yaml").write_text("---\n".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": f"count from {row}: ", "chosen": f"{row + 1}, {row + 2}", "rejected": f"{row}, {row}, {row}"}
        for row in range(60)
    ]
    (call.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    images = parse_yaml((tree / "recipes" / "image" / "flow.yaml").read_bytes(), "flow.yaml").value["stages"]
    images["flow"]["train"]["epochs"] = 1
    (call.folder / "recipe.yaml").write_text(json.dumps({**RECIPE, "stages": {**RECIPE["stages"], **images}}))
    call("check", "recipe.yaml", "--smoke")
    driver, deadline = call.start("run", "recipe.yaml"), time.monotonic() + 300
    while not any("manifest" in state.read_text() for state in call.folder.glob("store/refs/states/*/taught/*")):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    out, errors = driver.communicate(timeout=100)
    assert driver.returncode == Preempted.exit_code, out + errors
    assert re.search(r"^plan of extended.*?^\W*taught", out, re.DOTALL | re.MULTILINE), out
    call("resume", "last")
    return call


def test_a_recipe_uses_a_source_a_suite_and_a_kind_of_stage(finished: Commands) -> None:
    """The stage was resumed from its state, learned, was verified and committed."""
    store = finished.store
    (run,) = store.runs()
    lines = list(store.run(run).read_lines("metrics/taught/2"))
    assert lines[0]["step"] > 1
    made = {artifact.stage: artifact for artifact in store.list_artifacts()}
    assert [made[stage].kind for stage in ("early", "base", "taught", "measured")] == ["model"] * 3 + ["report"]
    verification, taught = made["taught"].verification, cast(dict[str, float], made["taught"].metrics["evaluation"])
    assert verification is not None
    assert verification.how == "clean-process"
    first = next(iter(store.run(run).read_lines("metrics/taught/1")))["values"]
    assert taught["loss"] < 0.5 * first["loss"]
    assert taught["agreement"] > 0.6 > first["agreement"]


def test_an_algorithm_makes_an_adapter(finished: Commands) -> None:
    """It has no critic, and its artifact neither."""
    store = finished.store
    (policy,) = (artifact for artifact in store.list_artifacts() if artifact.stage == "policy")
    assert policy.kind == "adapter"
    assert {name.split("/")[0] for name in policy.files} == {"model", "adapter"}
    (run,) = store.runs()
    lines = [line["values"] for line in store.run(run).read_lines("metrics/policy")]
    names = {name for values in lines for name in values}
    assert {"score_mean", "policy_loss", "lr"} <= names
    assert not {name for name in names if "value" in name or "critic" in name}


def test_a_family_of_images_draws(finished: Commands) -> None:
    """This process does not know the family; the extended tree's commands do."""
    (flow,) = (item for item in json.loads(finished("store", "ls", "--json")) if item["stage"] == "flow")
    assert flow["kind"] == "flow"
    address = f"store://{flow['fingerprint']}"
    assert json.loads(finished("store", "show", address, "--json"))["verification"]["how"] == "clean-process"
    finished("sample", address, "--grid", "grid.png", "--num-samples", "9")
    with Image.open(finished.folder / "grid.png") as grid:
        assert len(grid.getcolors(1 << 16) or ()) > 16
