"""What pretraining and unlabelled rows buy a classifier of texts: accuracy over seeds, with intervals.

    python benchmarks/encoder_gains.py FILE [--text COLUMN] [--label COLUMN] [--more FILE]... [--unquoted] [--seeds 5]
        [--share 0.1] [--outside FOLDER] [--keep FOLDER] [--set K=V]...

FILE is a CSV or TSV file (maybe .gz), further files of texts (`--more`) serve `words` alone; or it is `python-docs`:
`words` reads its training split, and kinds of things are told apart on its test split. The stages are those of
`recipes/text/polarity.yaml` through the product's own stage functions on one process: `words` restores hidden words of
the training rows, without their labels; `polarity` learns from it. Texts held out from training are held out from both.
Each seed has a pretraining of its own. Compared:

    scratch      all labels, from random weights (the architecture and tokenizer of `words`, not trained)
    pretrained   all labels, from `words`
    few_scratch  a share of the labels, from random weights
    few          the same labels, from `words`
    semi         the same labels, and the other rows by pseudo-labels
    outside      all labels, from the encoder in the folder `--outside`, by `recipes/text/minilm_polarity.yaml`

Beside them stands what counting gives from the same rows: naive Bayes over which tokens a text has.

`scratch` and the arms of few labels may train for another number of epochs or at another rate than the recipe's, so
that neither side is held back by settings that suit the other. With `--keep` an interrupted comparison resumes where it
was. Differences are paired by seed: their mean, and a 95 % interval by Student's t.
"""

import argparse
import contextlib
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.loading.load import dump_recipe, load_recipe, parse_recipe
from trainers.data.dataset import Dataset
from trainers.data.encoding import TextSettings
from trainers.data.labelled_batches import split_by_label
from trainers.data.layouts.labelled import Labelled
from trainers.data.materialise import DataRequest, materialise
from trainers.data.tokenizer import load_tokenization
from trainers.evaluation.image_metrics import interval
from trainers.models.imports import import_folder
from trainers.runtime import distributed
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store
from trainers.tasks.language_model import run_language_model
from trainers.training.context import StageContext

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "text" / "polarity.yaml"
OUTSIDE_RECIPE = RECIPE.with_name("minilm_polarity.yaml")
DOCS = "python-docs"
UNTRAINED_LR = 1e-12
"""One step at this rate leaves random weights."""
ARMS = ("scratch", "pretrained", "few_scratch", "few", "semi")
SCRATCH_EPOCHS, SCRATCH_LR, FEW_EPOCHS = 6.0, 1e-3, 12.0
PSEUDO_LABELS = '{"threshold": 0.9, "ratio": 3, "warmup_steps": 60}'
PAIRS = (("pretrained", "scratch"), ("few", "few_scratch"), ("semi", "few"), ("outside", "scratch"))


class Silent:
    """An observer that hears nothing."""

    def phase(self, name: str, **progress: float) -> None: ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def stop_requested(self) -> bool:
        return False

    def notify(self, text: str) -> None:
        pass

    def answers_stops(self, has_unsaved: Any) -> AbstractContextManager[None]:
        return nullcontext()


def run_stage(store: Store, folder: Path, name: str, stage: Any, seed: int, start: str | None) -> dict[str, Any]:
    """Run one stage of text in this process, commit what it made, and return its metrics; or find those of before."""
    known = {"stage": dump_json(stage), "seed": seed, "start": start}
    fingerprint = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    made = store.find_artifact(fingerprint)
    if made is None:
        ranks = distributed.join()
        given = {} if start is None else {"init_from": store.resolve(start)}
        run = f"{name}-{seed}-{fingerprint[:8]}"
        lease = store.take_lease(run, name)
        context = StageContext(store, run, name, fingerprint, lease, seed, folder, given, {}, Silent(), ranks)
        candidate = run_language_model(stage, context)
        assert candidate is not None
        made = ArtifactManifest(
            fingerprint=fingerprint,
            digest=files_digest(candidate.files),
            kind=candidate.kind,
            stage=name,
            files=dict(candidate.files),
            contract=candidate.contract,
            metrics=dict(candidate.metrics),
            outcome=dict(candidate.outcome),
        )
        store.put_artifact(made)
    store.name_artifact(f"{name}-{seed}", fingerprint)
    return dict(made.metrics)


def naive_bayes_accuracy(training_set: Dataset, held_out: Dataset, vocab_size: int, rows: np.ndarray) -> float:
    """Accuracy of multinomial naive Bayes over which tokens a text has, counts smoothed by one (Metsis et al. 2006).

    It counts these rows of the training set; the held-out set's labels are numbered as the training set's are.
    """
    counts_CV = np.ones((len(training_set.classes), vocab_size))
    shares_C = np.zeros(len(training_set.classes))
    for row in rows:
        label = training_set.arrays["labels"][row]
        counts_CV[label, np.unique(training_set.cut("text_ids", row))] += 1
        shares_C[label] += 1
    scores_CV = np.log(counts_CV / counts_CV.sum(axis=1, keepdims=True))
    prior_C = np.log(shares_C / shares_C.sum())
    guesses = [
        int((prior_C + scores_CV[:, np.unique(held_out.cut("text_ids", row))].sum(axis=1)).argmax())
        for row in range(len(held_out))
    ]
    return float(np.mean(np.array(guesses) == np.asarray(held_out.arrays["labels"])))


def counted_accuracies(
    store: Store, folder: Path, stage: Any, start: str, shares: Sequence[float]
) -> dict[float, float]:
    """Accuracy of naive Bayes from each share of the stage's labels, over the tokens of the model `start`."""
    tokenization = load_tokenization(store.folder(store.resolve(start), "model"))
    seen = DataRequest(stage.data, folder, Labelled(TextSettings(tokenization, stage.train.sequence_length)), seed=0)
    apart = replace(seen, held_out=True) if stage.evaluation is None else replace(seen, source=stage.evaluation)
    training_set, held_out = materialise(seen, store), materialise(apart, store)
    if held_out.classes != training_set.classes:
        raise SystemExit("training and held-out rows have other classes")
    labelled = [split_by_label(training_set, share)[0] for share in shares]
    given = (training_set, held_out, tokenization.vocab_size)
    return {share: naive_bayes_accuracy(*given, rows) for share, rows in zip(shares, labelled, strict=True)}


def dump_json(stage: Any) -> Any:
    """The stage as JSON data."""
    return stage.model_dump(mode="json", by_alias=True)


def docs_sources() -> list[str]:
    """Both stages read the documentation of this Python; its test split is held out."""
    return [
        f"stages.{stage}.{key}={{source: {DOCS}, split: {split}}}"
        for stage in ("words", "polarity")
        for key, split in (("data", "train"), ("evaluation", "test"))
    ]


def file_sources(arguments: argparse.Namespace) -> list[str]:
    """Both stages read the file, `words` without its labels and with the further ones; a share is held out."""
    labelled, texts = [arguments.file], [arguments.file, *arguments.more]
    return [
        f"stages.{stage}.data.{key}={json.dumps(value)}"
        for stage, files, columns in (("words", texts, ("text",)), ("polarity", labelled, ("text", "label")))
        for key, value in {
            "files": [str(Path(file).resolve()) for file in files],
            "quotes": not arguments.unquoted,
            "columns": {column: getattr(arguments, column) for column in columns},
        }.items()
    ]


def stages_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The stages of all arms, as JSON data."""
    overrides = docs_sources() if arguments.file == DOCS else file_sources(arguments)
    loaded = load_recipe(RECIPE, [*overrides, *arguments.set])
    found = dump_recipe(loaded.recipe)["stages"]
    words, tuned = found["words"], found["polarity"]
    for stage in (words, tuned):
        stage["train"] |= {"save_every": 200, "evaluate_every": 10**9, "evaluation_rows": 10**6}
        stage["shard"] = one_process(stage["shard"])
    once = {"steps": 1, "epochs": None, "tokens": None, "optimizer": {"lr": UNTRAINED_LR}, "schedule": {}}
    blank = {**words, "train": words["train"] | once}
    few_train = tuned["train"] | {"steps": None, "epochs": arguments.few_epochs}
    few = {**tuned, "labelled_share": arguments.share, "train": few_train}
    semi = {**few, "pseudo_labels": json.loads(arguments.pseudo_labels)}
    scratch_train = tuned["train"] | {"steps": None, "epochs": arguments.scratch_epochs}
    scratch_train["optimizer"] = tuned["train"]["optimizer"] | {"lr": arguments.scratch_lr}
    scratch = {**tuned, "init_from": "blank", "train": scratch_train}
    trained = {"scratch": scratch, "pretrained": tuned, "few_scratch": {**few, "init_from": "blank"}, "few": few}
    return {"words": words, "blank": blank, **trained, "semi": semi, **outside_stage(arguments, overrides, tuned)}


def outside_stage(
    arguments: argparse.Namespace, overrides: Sequence[str], tuned: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The stage that starts from a folder, on the rows of the others and measured as they are."""
    if arguments.outside is None:
        return {}
    on_rows = [text for text in overrides if not text.startswith("stages.words.")]
    start = f"stages.polarity.init_from={Path(arguments.outside).resolve()}"
    stage = dump_recipe(load_recipe(OUTSIDE_RECIPE, [*on_rows, start]).recipe)["stages"]["polarity"]
    measured = {key: tuned["train"][key] for key in ("save_every", "evaluate_every", "evaluation_rows")}
    return {"outside": {**stage, "train": stage["train"] | measured, "shard": one_process(stage["shard"])}}


def one_process(shard: Mapping[str, Any]) -> dict[str, Any]:
    """A plain loop, in fp32 unless a precision was given: nothing settles `auto` here."""
    precision = "fp32" if shard["precision"] == "auto" else shard["precision"]
    return {**shard, "engine": "plain", "zero": 0, "precision": precision}


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help=f"a CSV or TSV file, or {DOCS}")
    parser.add_argument("--text", default="text", help="column of the texts")
    parser.add_argument("--label", default="label", help="column of the classes")
    parser.add_argument("--more", action="append", default=[], metavar="FILE", help="more texts for `words`")
    parser.add_argument("--unquoted", action="store_true", help="quotation marks in the files are text")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.1, help="labels that few and semi use")
    parser.add_argument("--outside", metavar="FOLDER", help="a pretrained encoder that the arm `outside` starts from")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=(*ARMS, "outside"))
    parser.add_argument("--scratch-epochs", type=float, default=SCRATCH_EPOCHS)
    parser.add_argument("--scratch-lr", type=float, default=SCRATCH_LR)
    parser.add_argument("--few-epochs", type=float, default=FEW_EPOCHS)
    parser.add_argument("--pseudo-labels", default=PSEUDO_LABELS)
    parser.add_argument("--keep", metavar="FOLDER", help="keep what was trained here, and go on from it")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="as of `trainwright run`")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: an interval takes two seeds or more")
    if "outside" in arguments.arms and arguments.outside is None:
        parser.error("--arms outside: give its folder by --outside")
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {arm: [] for arm in arguments.arms}
    needed = {"scratch": "blank", "few_scratch": "blank"}
    with contextlib.ExitStack() as stack:
        folder = Path(arguments.keep or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        recipe = parse_recipe({"name": "gains", "stages": stages_of(arguments)})
        store = Store.open(f"{folder}/store")
        if arguments.outside is not None:
            brought = import_folder(store, Path(arguments.outside)).fingerprint
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for arm in arguments.arms:
                start = needed.get(arm, "words")
                chain = ((start, None), (arm, f"{start}-{seed}")) if arm != "outside" else ((arm, brought),)
                for stage, given in chain:
                    began = time.process_time()
                    metrics = run_stage(store, folder, stage, recipe.stages[stage], seed, given)
                    values = metrics["evaluation"]
                    shown = {
                        key: values[key]
                        for key in ("loss", "masked_accuracy", "accuracy", "calibration_error")
                        if key in values
                    }
                    told = "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
                    print(f"seed {seed}  {stage:<10} {time.process_time() - began:5.0f} CPU s  {told}", flush=True)
                found[arm].append(100 * values["accuracy"])
        counted = counted_accuracies(store, folder, recipe.stages[arm], given, (1.0, arguments.share))
    print("\n| arm | accuracy, mean of the seeds | each |\n| --- | --- | --- |")
    for arm, accuracies in found.items():
        print(f"| {arm} | {statistics.fmean(accuracies):.1f} | {', '.join(f'{value:.1f}' for value in accuracies)} |")
    shown = ", ".join(f"{100 * value:.1f} from {share:.0%} of the labels" for share, value in counted.items())
    print(f"naive Bayes: {shown}")
    for more, less in PAIRS:
        if more in found and less in found:
            pairs = zip(found[more], found[less], strict=True)
            gain = interval([one - other for one, other in pairs])
            print(f"{more} - {less}: {gain.value:+.1f} points, 95 % interval {gain.low:+.1f} to {gain.high:+.1f}")


if __name__ == "__main__":
    main()
