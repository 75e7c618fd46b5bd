"""The stable code of every problem that `check` reports: one a rule, however it is found and worded.

`python -m recipes.problem_codes docs/problems.md` writes the page; a test fails when it is out of date.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Self


class Code(StrEnum):
    """What is wrong; the value is what `check` prints, `meaning` what the page of problems says."""

    meaning: str

    def __new__(cls, code: str, meaning: str) -> Self:
        """A member that is its code."""
        member = str.__new__(cls, code)
        member._value_, member.meaning = code, meaning
        return member

    # the file
    RECIPE_NOT_READABLE = "recipe-not-readable", "A recipe file is missing, not a regular file, or cannot be read."
    RECIPE_TOO_LARGE = "recipe-too-large", "A recipe has too many bytes, values or levels."
    NOT_UTF8 = "not-utf8", "A file is not UTF-8 text."
    CONTROL_CHARACTER = "control-character", "A recipe contains a control character."
    INVALID_YAML = "invalid-yaml", "A recipe is not one YAML document with text keys."
    UNSUPPORTED_YAML = "unsupported-yaml", "A recipe uses a YAML anchor, alias, tag or merge key."
    UNSUPPORTED_NUMBER = "unsupported-number", "A number is not finite, not decimal, has a leading 0 or is too long."
    DUPLICATE_KEY = "duplicate-key", "A key is given twice in one mapping."
    INVALID_EXTENDS = "invalid-extends", "`extends` is not the path of one recipe, or too many recipes are chained."
    EXTENDS_CYCLE = "extends-cycle", "Recipes extend each other in a cycle."
    INVALID_OVERRIDE = "invalid-override", "A `--set` is not PATH=VALUE, or its path leads nowhere."

    # single values
    UNKNOWN_KEY = "unknown-key", "The key does not exist here."
    MISSING_KEY = "missing-key", "A required key, or one of several alternatives, is missing."
    CONFLICTING_KEYS = "conflicting-keys", "Keys or choices exclude each other."
    WRONG_TYPE = "wrong-type", "A value has the wrong type, for example text instead of a number."
    OUT_OF_RANGE = "out-of-range", "A number is above or below what is allowed."
    WRONG_LENGTH = "wrong-length", "A list or a text is too short or too long."
    UNKNOWN_CHOICE = "unknown-choice", "A value is not among the allowed ones."
    INVALID_FORMAT = "invalid-format", "A text does not have the required format."
    DUPLICATE_ITEM = "duplicate-item", "Something is listed twice that must differ."

    NOT_CONVERTIBLE = "not-convertible", "A key of another system says what no recipe can say."

    # values that must fit each other
    NO_EFFECT = "no-effect", "A setting has no effect with the rest of the recipe."
    NOT_APPLICABLE = "not-applicable", "A setting does not apply to this kind of stage, model or data."
    UNMET_REQUIREMENT = "unmet-requirement", "A setting needs another one that is missing or has another value."
    NOT_DIVISIBLE = "not-divisible", "A number must divide another one."
    MIN_ABOVE_MAX = "min-above-max", "A lower bound is above its upper bound."
    BATCH_NOT_DIVISIBLE = "batch-not-divisible", "A batch cannot be divided among workers, mini- or micro-batches."
    TOO_MANY_STEPS = "too-many-steps", "More sampling steps than the diffusion has timesteps."
    TOO_FEW_STEPS = "too-few-steps", "Too few sampling steps to learn from."
    TOO_FEW_SAMPLES = "too-few-samples", "Too few samples to compute a statistic."
    WARMUP_TOO_LONG = "warmup-too-long", "A warm-up does not end before the stage does."
    SEQUENCE_TOO_LONG = "sequence-too-long", "A sequence is longer than the model's positions."
    SEQUENCE_TOO_SHORT = "sequence-too-short", "A sequence has no room for an image and an answer."
    SIZE_NOT_DIVISIBLE = "size-not-divisible", "An image or latent cannot be halved as often as the network does."
    IMAGE_SHAPE_MISMATCH = "image-shape-mismatch", "Images that meet in a stage differ in size or channels."
    UNKNOWN_METRIC = "unknown-metric", "A gate names a metric that the report does not contain."

    # references and models
    INVALID_REFERENCE = "invalid-reference", "A reference is not a stage, store, hub or folder address."
    UNKNOWN_STAGE = "unknown-stage", "The recipe has no such stage."
    UNKNOWN_OUTPUT = "unknown-output", "A stage has no such output."
    STAGE_CYCLE = "stage-cycle", "Stages depend on each other in a cycle."
    WRONG_ARTIFACT_KIND = "wrong-artifact-kind", "An input is another kind of artifact than the stage needs."
    UNSUPPORTED_FAMILY = "unsupported-family", "A stage or suite does not work with this model family."
    UNSUPPORTED_AUTOENCODER = "unsupported-autoencoder", "Diffusion cannot run in this autoencoder's latents."
    TOKENIZER_MISMATCH = "tokenizer-mismatch", "Models that read each other's tokens have different tokenizers."
    TEMPLATE_MISMATCH = "template-mismatch", "A stage formats plain text differently from where its model was trained."
    UNKNOWN_MODULE = "unknown-module", "An adapter targets a module that the model does not have."
    UNKNOWN_CLASS = "unknown-class", "A class is not among those of the model's data."
    MISSING_REWARD_FUNCTION = "missing-reward-function", "A reward names a function or entry point that is not there."
    MISSING_PACKAGE = "missing-package", "A setting needs a package that is not installed."
    NO_SANDBOX = "no-sandbox", "The machine lacks what a sandbox is made of, in which code of a model may run."

    # tokenizers
    VOCABULARY_TOO_SMALL = "vocabulary-too-small", "A vocabulary does not hold the bytes and the special tokens."
    TOO_FEW_SENTINELS = "too-few-sentinels", "A tokenizer has fewer sentinel tokens than span corruption needs."
    MISSING_SPECIAL_TOKEN = "missing-special-token", "A tokenizer lacks a special token that the model needs."
    UNKNOWN_TOKEN = "unknown-token", "A token is not in the vocabulary."
    SPLIT_SPECIAL_TOKEN = "split-special-token", "A chat template writes a marker that is not a special token."
    PAD_TOKEN_CONFLICT = "pad-token-conflict", "The pad token also ends responses."
    MISSING_CHAT_TEMPLATE = "missing-chat-template", "A tokenizer has no chat template."
    INVALID_CHAT_TEMPLATE = "invalid-chat-template", "A chat template does not compile, or fails on a conversation."
    END_TOKENS_DISAGREE = "end-tokens-disagree", "Warning: a model's files name different end tokens."
    NO_END_OF_TURN = "no-end-of-turn", "Warning: a chat template writes no special token after an answer."

    # model folders
    MISSING_FOLDER = "missing-folder", "There is no such folder."
    NOT_A_MODEL_FOLDER = "not-a-model-folder", "A folder holds no whole model."
    MISSING_MODEL_FILE = "missing-model-file", "A model folder lacks a file."
    UNREADABLE_MODEL_FILE = "unreadable-model-file", "A file of a model folder is damaged or does not hold together."
    UNSUPPORTED_MODEL = "unsupported-model", "A model's type, class or format is not supported."
    REMOTE_CODE = "remote-code", "A model needs code from its folder, which is never run."
    LAYER_MISMATCH = "layer-mismatch", "A model's weights and its config.json disagree about its layers."
    TOKEN_ID_MISMATCH = "token-id-mismatch", "A model's configuration and its tokenizer disagree about token ids."
    IMAGE_TOKEN_MISMATCH = "image-token-mismatch", "Files of a vision-language model disagree about image tokens."

    # data
    MISSING_FILE = "missing-file", "No such file, or no file matches."
    INVALID_PATH = "invalid-path", "A path or a pattern is not usable, or does not name a regular file."
    EMPTY_FILE = "empty-file", "A file has no rows or no content."
    UNREADABLE_DATA = "unreadable-data", "Data cannot be read."
    INVALID_DATA_FORMAT = "invalid-data-format", "A file does not have the format of its source."
    MISSING_COLUMN = "missing-column", "Rows lack a column or an array that is needed."
    WRONG_CELL_TYPE = "wrong-cell-type", "A value in a row has the wrong type."
    CELL_COUNT_MISMATCH = "cell-count-mismatch", "Rows have another number of cells than the header names."
    FILE_COUNT_MISMATCH = "file-count-mismatch", "Two lists of files that belong together differ in length."
    ROWS_NOT_USABLE = "rows-not-usable", "The first rows cannot be turned into what the model reads."
    UNSUITABLE_SOURCE = "unsuitable-source", "A source cannot provide the columns that the stage reads."
    MISSING_HELD_OUT = "missing-held-out", "A stage has no held-out rows to evaluate on."
    SINGLE_DOCUMENT = "single-document", "A single document cannot be split into training and held-out rows."
    MISSING_LABELS = "missing-labels", "Data have no labels, which the model learns or reads."
    MISSING_CAPTIONS = "missing-captions", "Images have no captions, which the model reads."
    MISSING_IMAGES = "missing-images", "Rows or a folder have no images, which the model reads."
    UNREADABLE_IMAGE = "unreadable-image", "An image is missing, remote or damaged."
    UNEXPECTED_IMAGES = "unexpected-images", "Rows have images, but the model has no vision tower."
    MISSING_REVISION = "missing-revision", "A hub data set is not pinned to a revision."
    UNKNOWN_SPLIT = "unknown-split", "A data set has no such split."

    # the machines and the store
    INPUT_NOT_FOUND = "input-not-found", "An input from the store, the hub or a folder cannot be used."
    STORE_NOT_USABLE = "store-not-usable", "The store cannot be opened or written."
    STORE_DAMAGED = "store-damaged", "Bytes in the store are not what their manifest says."
    STORE_TOO_SMALL = "store-too-small", "The store has less free space than the run needs."
    CLUSTER_NOT_REACHABLE = "cluster-not-reachable", "The cluster cannot be reached."
    CLUSTER_TOO_SMALL = "cluster-too-small", "The cluster has fewer workers than the recipe needs."
    MEMORY_TOO_SMALL = "memory-too-small", "A worker has less memory than a stage needs."
    FILES_DIFFER = "files-differ", "A node has other data files than the submitting machine."
    NOT_UPLOADABLE = "not-uploadable", "Rows name a file by a path that would not survive an upload."


_PAGE = """\
# Problems

Generated by `python -m recipes.problem_codes docs/problems.md`.

Every problem that `check` reports ends in a code in brackets; `check --json` has it as `code`. The same rule has the
same code wherever it is found. Codes are stable: scripts may compare them, sentences may change.

| code | meaning |
| --- | --- |
"""


def markdown_page() -> str:
    """The page with every code and its meaning, in alphabetical order."""
    return _PAGE + "".join(f"| `{code}` | {code.meaning} |\n" for code in sorted(Code))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown_page(), encoding="utf-8")
