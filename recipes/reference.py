"""The recipe reference, generated from the schema: a JSON schema for editors and a Markdown page for people.

`python -m recipes.reference docs/recipe-reference.md` writes the page; a test fails when it is out of date.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from recipes.data.filters import Filter
from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.models.architecture import Architecture
from recipes.models.images.architecture import ImageArchitecture
from recipes.planning.smoke import shrink
from recipes.recipe import Recipe
from recipes.stages.algorithms import ImageAlgorithm, TextAlgorithm
from recipes.stages.benchmarks.union import AnyBenchmark
from recipes.stages.environments import Environment
from recipes.stages.kinds import Stage
from recipes.stages.preference_losses import PreferenceLoss
from recipes.stages.rewards.union import RewardTerm
from recipes.stages.rollout_engines import RolloutEngine

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

INTRODUCTION = """\
# Recipe reference

Generated from the schema by `python -m recipes.reference docs/recipe-reference.md`.

A recipe is one YAML file. Its keys are closed: an unknown one is an error. `meaning` keys decide what is computed and
enter the fingerprint; `placement` keys decide where and how often, and never make a finished stage run again.

- `extends: other.yaml` lays this file over one other: mappings merge, everything else is replaced whole, and a mapping
  that names another variant (another `kind`, `source`, `type`) replaces the other one. `null` takes a value back.
- `--set PATH=VALUE` sets one value on the command line, for example `--set stages.base.train.steps=100`.
- Numbers are YAML 1.2: `1e-4` and `2_000_000` are numbers; `no`, `12:30` are text; aliases, tags and duplicate keys are
  errors.
- Inputs name a stage (`sft`), a part of one (`policy.critic`), the store (`store://NAME`, `store://FINGERPRINT`), a
  local folder in the Hugging Face layout (`./model`) or the hub (`hf://ORG/NAME@REVISION`).
- Relative paths start at the folder of the recipe that is run, those too that it takes over by `extends`: a recipe in
  another folder has to write them again. `extends` itself starts at the folder of the file that contains it.
"""


def _members(union: Any) -> tuple[str, ...]:
    """Names of the classes of a union, in their order."""
    if isinstance(union, type):
        return (union.__name__,)
    parts = get_args(union)[:1] if get_origin(union) is Annotated else get_args(union)
    return tuple(dict.fromkeys(name for part in parts for name in _members(part)))


_SECTIONS = (
    ("Stages", _members(Stage)),
    ("Architectures", (*_members(Architecture), "RopeParameters")),
    ("Image families", _members(ImageArchitecture)),
    ("Tokenizers", ("TrainTokenizer", "ExistingTokenizer")),
    ("Data sources", _members(Source)),
    ("Filters of rows", _members(Filter)),
    ("Image sources", _members(ImageSource)),
    (
        "Training",
        (
            *("Train", "ImageTrain", "AdamW", "Schedule", "Lora", "Shard"),
            *("Corruption", "SpanCorruption", "PseudoLabels", "Negatives"),
        ),
    ),
    ("Preference losses", _members(PreferenceLoss)),
    (
        "Reinforcement learning",
        (
            *("Rollout", *_members(RolloutEngine), *_members(TextAlgorithm), "Critic"),
            *("ImageRollout", *_members(ImageAlgorithm), "FixedKl", "AdaptiveKl"),
        ),
    ),
    (
        "Rewards",
        (
            *_members(RewardTerm),
            *("SandboxLimits", "ClassReward", "RuleReward"),
        ),
    ),
    ("Environments", _members(Environment)),
    ("Evaluation", ("Sampling", "Bound", "PairChoice", *_members(AnyBenchmark))),
    ("Cluster", ("Cluster",)),
)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors' completion and checks."""
    schema = Recipe.model_json_schema(by_alias=True)
    properties = schema["properties"]
    properties = {"extends": {"type": "string", "description": "Recipe that this one is laid over."}, **properties}
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "Trainwright recipe", "properties": properties}


def markdown_reference() -> str:
    """The reference page."""
    schema = json_schema()
    models: dict[str, dict[str, Any]] = schema["$defs"]
    smoke_source = sys.modules[shrink.__module__].__doc__ or ""
    lines = [INTRODUCTION, f"`--smoke` runs {smoke_source[0].lower()}{smoke_source[1:].strip()}", ""]
    anchors = {name: _heading(name, model) for name, model in models.items()}
    lines += ["## Recipe", "", *_table(schema, anchors, skip=("extends",)), ""]
    shown: set[str] = set()
    for title, names in _SECTIONS:
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"### {anchors[name]}", "", " ".join(models[name].get("description", "").split()), ""]
            lines += [*_table(models[name], anchors), ""]
            shown.add(name)
    missing = sorted(set(models) - shown)
    if missing:
        raise ValueError(f"the reference has no section for {', '.join(missing)}")
    return "\n".join(lines).rstrip() + "\n"


def _heading(name: str, model: dict[str, Any]) -> str:
    """How a recipe selects the model (`kind: rl`), or the model's name."""
    for key in ("kind", "type", "source", "train", "family", "rule", "by", "suite"):
        value = model["properties"].get(key, {})
        if "const" in value:
            of_images = key in ("source", "kind") and "Image" in name
            return f"{key}: {value['const']}" + (" (images)" if of_images else "")
    return next((key for key in ("from", "mix") if key in model["properties"]), name)


def _table(model: dict[str, Any], anchors: dict[str, str], skip: tuple[str, ...] = ()) -> Iterator[str]:
    required = set(model.get("required", ()))
    yield "| key | value | default | role | |"
    yield "| --- | --- | --- | --- | --- |"
    tags_first = sorted(model["properties"].items(), key=lambda item: "const" not in item[1])
    for key, value in tags_first:
        if key in skip:
            continue
        default = "required" if key in required else _default(value)
        role = value.get("role", "")
        cells = [f"`{key}`", _value(value, anchors), default, role, value.get("description", "")]
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _default(value: dict[str, Any]) -> str:
    if "default" not in value:
        return "see there"
    default = value["default"]
    if default is None:
        return "`null`"
    text = str(default).replace("True", "true").replace("False", "false")
    return f"`{text}`" if len(text) <= 40 else "see there"


def _value(value: dict[str, Any], anchors: dict[str, str]) -> str:
    """The type and bounds of a property as a reader's phrase."""
    if "$ref" in value:
        return _link(anchors[value["$ref"].rsplit("/", 1)[-1]])
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    for key in ("anyOf", "oneOf"):
        if key in value:
            members = [_value(member, anchors) for member in value[key] if member.get("type") != "null"]
            return " or ".join(members)
    kind = value.get("type")
    if kind == "array":
        items = value.get("items") or (value.get("prefixItems") or [{}])[0]
        return f"list of {_value(items, anchors)}"
    if kind == "object":
        inner = value.get("additionalProperties") or next(iter(value.get("patternProperties", {}).values()), None)
        return f"mapping to {_value(inner, anchors)}" if isinstance(inner, dict) else "mapping"
    noun = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}[str(kind)]
    return noun + _bounds(value)


def _bounds(value: dict[str, Any]) -> str:
    words = []
    for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<")):
        if key in value:
            bound = value[key]
            words.append(f"{sign} {f'{bound:_}' if isinstance(bound, int) else f'{bound:g}'}")
    return " " + ", ".join(words) if words else ""


def _link(heading: str) -> str:
    """A link to a section of the page (anchors as GitHub makes them)."""
    anchor = "".join(character for character in heading.lower() if character.isalnum() or character in " -_")
    return f"[{heading}](#{anchor.replace(' ', '-')})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="Markdown file to write")
    parser.parse_args().page.write_text(markdown_reference(), encoding="utf-8")
