"""Nothing that is loaded can be code: no pickle, no torch.load, no archives, on any path of the packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("recipes", "trainers", "rlhf", "launch", "cluster")
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "tarfile",
    "zipfile", "runpy", "torch.hub", "torch.jit", "torch.package", "torch.serialization",
    "torch.distributed.checkpoint", "transformers.dynamic_module_utils",
}  # fmt: skip
FORBIDDEN = {
    "torch.load", "pandas.read_pickle", "shutil.unpack_archive", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "os.system", "numpy.lib.format.read_array", "safetensors.torch.load_model", "accelerate.load_checkpoint_in_model",
    "accelerate.load_checkpoint_and_dispatch", "peft.load_peft_weights", "transformers.modeling_utils.load_state_dict",
    "builtins.eval", "builtins.exec", "builtins.__import__", "eval", "exec", "__import__",
}  # fmt: skip
STOCK_LOADERS = {"from_pretrained", "from_single_file", "load_adapter", "load_lora_weights", "load_checkpoint"}
"""Methods that open folders of others and choose the file format themselves."""
DOOR = "trainers/store/hf_loaders.py"
"""The one file that may call them on models."""
JSON_READERS = {
    ("trainers/models/load.py", "model_class.config_class"),
    ("trainers/models/folders.py", "PreTrainedTokenizerFast"),
    ("trainers/data/image_processor.py", "processor_class"),
}
"""Stock classes of configurations, tokenizers and processors: JSON is all that they open."""
IMPORTERS = {
    "trainers/runtime/preload.py": "the configuration of a worker", "cluster/rank.py": "the payload of our own driver",
    "cluster/fork_server.py": "the command line of our own session", "cluster/ray_start.py": "literals",
    "cluster/session.py": "literals", "rlhf/rewards/functions.py": "a function that the recipe names",
    "rlhf/environments/python_docs.py": "names of the standard library alone",
}  # fmt: skip
"""Who imports modules by name, and where the names come from; none is read from a store or a model."""
RUNS_CODE = "rlhf/sandbox/box.py"
"""Runs code that a model wrote, inside of the sandbox."""
UNPACKING = {"extract", "extractall"}
LISTS_NAMES = {"trainers/data/sources/arrays.py": "zipfile"}
"""Reads the arrays of an .npz; unpacks nothing."""
UNPACKER = "trainers/data/sources/archives.py"
"""Unpacks rows in archives, by readers that leave no member outside the folder."""


def findings(source: str, place: str = "") -> Iterator[str]:
    """Say what a source file uses of what is forbidden, under whatever name it was imported."""
    tree = ast.parse(source)
    names = _imported(tree)
    forbidden = (FORBIDDEN | FORBIDDEN_MODULES) - {LISTS_NAMES.get(place)}
    if place == UNPACKER:
        forbidden -= {"tarfile", "zipfile"}
    if place == RUNS_CODE:
        forbidden -= {"builtins.exec", "exec"}
    if place not in IMPORTERS:
        forbidden |= {"importlib.import_module", "importlib.util.spec_from_file_location"}
    for node in ast.walk(tree):
        used: list[str] = []
        if isinstance(node, ast.Import):
            used = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            used = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name):
            used = [_dotted(node, names)]
        yield from (f"line {node.lineno}: {path}" for path in used if _is_in(path, forbidden))
        if isinstance(node, ast.Attribute) and node.attr in STOCK_LOADERS and place != DOOR:
            reader = ast.unparse(node.value)
            if (place, reader) not in JSON_READERS:
                yield f"line {node.lineno}: {reader}.{node.attr}"
        if isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {found}" for found in _called(node, names, place))


def _imported(tree: ast.AST) -> dict[str, str]:
    """The dotted path of every name that an import binds."""
    names: dict[str, str] = {"np": "numpy"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _is_in(path: str, forbidden: set[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in forbidden)


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The path that an expression means, after the imports; empty where it is no path."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value, names)
        return f"{before}.{node.attr}" if before else ""
    return ""


def _called(node: ast.Call, names: dict[str, str], place: str) -> Iterator[str]:
    """What of a call is forbidden: arrays that may be pickled, unpacking, attributes by name, options."""
    given = {word.arg: word.value for word in node.keywords}

    def is_false(option: str) -> bool:
        value = given.get(option)
        return isinstance(value, ast.Constant) and value.value is False

    called = _dotted(node.func, names)
    if called == "numpy.load" and not is_false("allow_pickle"):
        yield "numpy.load without allow_pickle=False"
    if isinstance(node.func, ast.Attribute) and node.func.attr in UNPACKING and place != UNPACKER:
        yield f"{node.func.attr}()"
    if called == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
        meant = f"{_dotted(node.args[0], names)}.{node.args[1].value}"
        if _is_in(meant, FORBIDDEN | FORBIDDEN_MODULES) or node.args[1].value in STOCK_LOADERS:
            yield f"getattr: {meant}"
    for option in ("trust_remote_code", "allow_pickle"):
        if option in given and not is_false(option):
            yield option
    if is_false("weights_only"):
        yield "weights_only=False"
    if is_false("use_safetensors"):
        yield "use_safetensors=False"


FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_load_path_can_run_code(path: Path) -> None:
    assert list(findings(path.read_text(), path.relative_to(ROOT).as_posix())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import tarfile as t", "import torch\ntorch.load('x')",
        "from torch import load", "import torch as t\nt.load('x')", "import torch\nread = torch.load",
        "import torch\ngetattr(torch, 'load')('x')", "from torch.serialization import load",
        "import torch.serialization as s\ns.load('x')", "import torch\ntorch.jit.load('x')",
        "import torch\ntorch.hub.load('x', 'y')", "from torch import hub", "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint", "from torch.distributed.checkpoint import load",
        "import importlib\nimportlib.import_module(name)", "from importlib import import_module\nimport_module(name)",
        "np.load('x')", "import numpy\nnumpy.load('x', allow_pickle=True)", "import numpy as n\nn.load('x')",
        "from numpy import load\nload('x')", "import shutil\nshutil.unpack_archive('x')", "eval('1')",
        "import yaml\nyaml.load(x, Loader=L)", "import pandas as pd\npd.read_pickle('x')", "archive.extractall('x')",
        "AutoModel.from_pretrained('x', use_safetensors=True)", "PeftModel.from_pretrained(model, 'x')",
        "model.load_adapter('x')", "getattr(stock, 'from_pretrained')('x')", "read = AutoModel.from_pretrained",
        "UNet2DModel.from_single_file('x')", "f(trust_remote_code=True)", "f(weights_only=False)",
        "f(use_safetensors=False)", "from peft import load_peft_weights", "import torch\nimport zipfile",
    ],
)  # fmt: skip
def test_the_search_finds(source: str) -> None:
    assert list(findings(source, "launch/sampling/text.py"))


def test_the_search_spares() -> None:
    harmless = "np.load('x', allow_pickle=False, mmap_mode='r')\nsafe_open('x')\nimport json\njson.loads('1')"
    assert list(findings(harmless)) == []
    assert len(FILES) > 20


def test_what_is_excepted_is_there() -> None:
    """An exception that nothing uses hides the next call."""
    for place, reader in JSON_READERS:
        assert f"{reader}.from_pretrained(" in (ROOT / place).read_text()
    for place in IMPORTERS:
        assert "import_module(" in (ROOT / place).read_text()
    door = ast.parse((ROOT / DOOR).read_text())
    calls = [node for node in ast.walk(door) if isinstance(node, ast.Call) and _is_loading(node)]
    assert {ast.unparse(call.func): {word.arg for word in call.keywords} for call in calls} == {
        "stock.from_pretrained": {"local_files_only", "use_safetensors", None},
        "gguf_class.from_pretrained": {"local_files_only", "gguf_file", None},
        "tokenizer_class.from_pretrained": {"local_files_only", "trust_remote_code"},
        "PeftModel.from_pretrained": set(),
    }
    assert all(ast.unparse(call.args[-1]) in ("place", "str(place)") for call in calls), "the checked view alone"


def _is_loading(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute) and node.func.attr in STOCK_LOADERS
