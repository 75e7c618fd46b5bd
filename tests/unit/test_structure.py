"""No circular imports in the product, behind lazy imports and for type checking neither; and the script that looks."""

from pathlib import Path

import pytest

from benchmarks.dispatch import class_sites, dispatch_sites, family_names, name_sites, stand_in_sites
from benchmarks.product_source import Tree, read_tree
from benchmarks.structure import import_circles, twice_worded


@pytest.fixture(scope="module")
def product() -> Tree:
    """The product's files, parsed once."""
    return read_tree()


def test_no_module_imports_itself_in_the_end(product: Tree) -> None:
    assert import_circles(product, for_types=True) == []


LISTED = "python -m benchmarks.structure --sites lists the places"


def test_stages_answer_for_themselves(product: Tree) -> None:
    sites = class_sites(product, set(product.declared["kind"]))
    assert len(sites) <= 25, f"ask the stage: {LISTED}"
    assert len(dispatch_sites(product, "stage classes")) <= 25, f"ask the stage, the use or the layout: {LISTED}"


def test_sources_answer_for_themselves(product: Tree) -> None:
    assert len(dispatch_sites(product, "source classes")) <= 15, f"ask the source: {LISTED}"


def test_families_answer_for_themselves(product: Tree) -> None:
    assert len(name_sites(product, family_names(product))) <= 11, "ask the family's object: TextFamily, FamilyRuntime"
    assert len(dispatch_sites(product, "family names")) <= 32, f"ask the family, or MODEL_KINDS: {LISTED}"
    classes = class_sites(product, set(product.declared["family"]))
    elsewhere = [site for site in classes if site.module != "trainers.models.images.families"]  # where all are listed
    assert len(elsewhere) <= 2, "ask the architecture"


def test_no_worker_words_a_rule_of_check(product: Tree) -> None:
    assert twice_worded(product) == [], "let the worker ask the rule: raise_findings, or RequestError.of(finding)"


def test_a_rule_worded_twice_is_found(tmp_path: Path) -> None:
    for name, text in (
        ("recipes", 'message = f"{length} tokens are longer than the positions of the network"\n'),
        ("trainers", 'raise RequestError(f"the network has positions for {tokens} tokens; {length} is longer")\n'),
        ("rlhf", "raise RequestError.of(finding)\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rules.py").write_text(text)
    ((refusal, rule),) = twice_worded(read_tree(tmp_path, ["recipes", "trainers", "rlhf"]))
    assert (refusal.module, refusal.line, rule.module) == ("trainers.rules", 1, "recipes.rules")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    return folder


def test_a_lazy_circle_is_found(package: Path, tmp_path: Path) -> None:
    (package / "one.py").write_text("from recipes.two import two\n")
    (package / "two.py").write_text("def two():\n    from recipes import three\n    return three\n")
    (package / "three.py").write_text("import recipes.one\n")
    (package / "four.py").write_text("from recipes.one import x\n")
    assert import_circles(read_tree(tmp_path, ["recipes"])) == [["recipes.one", "recipes.three", "recipes.two"]]


def test_a_circle_of_types_is_one_on_request(package: Path, tmp_path: Path) -> None:
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .two import Two\n"
    (package / "one.py").write_text(guarded)
    (package / "two.py").write_text("from .one import One\n")
    tree = read_tree(tmp_path, ["recipes"])
    assert import_circles(tree) == []
    assert import_circles(tree, for_types=True) == [["recipes.one", "recipes.two"]]


def test_places_that_dispatch(package: Path, tmp_path: Path) -> None:
    (package / "kinds.py").write_text(
        "class Vae:\n    family: Literal['vae'] = 1\nclass Gan:\n    family: Literal['gan'] = 1\nBOTH = (Vae, Gan)\n"
    )
    (package / "uses.py").write_text(
        "def f(x: Vae, family):\n"
        "    if isinstance(x, Vae | Gan): ...\n"
        "    match x:\n"
        "        case Vae() | other.Gan(width=1): ...\n"
        "    if isinstance(x, BOTH) or type(x) is Vae: ...\n"
        "    y = {Gan: 'vae', 'gan': Vae()}\n"
        "    return family == 'vae' or family in ('vae', 'gan')  # 'gan'\n"
    )
    tree = read_tree(tmp_path, ["recipes"])
    assert set(tree.declared["family"]) == {"Vae", "Gan"}
    classes = sorted((site.line, site.name) for site in class_sites(tree, {"Vae", "Gan"}))
    assert classes == [(2, "Gan"), (2, "Vae"), (4, "Gan"), (4, "Vae"), (5, "BOTH"), (5, "Vae"), (6, "Gan")]
    names = sorted((site.line, site.name) for site in name_sites(tree, {"vae", "gan"}))
    assert names == [(6, "gan"), (7, "gan"), (7, "vae")]


def test_words_that_stand_in_for_classes(package: Path, tmp_path: Path) -> None:
    (package / "stages").mkdir()
    (package / "convert").mkdir()
    (package / "stages" / "answers.py").write_text("Role = Literal['text', 'labels']\n")
    (package / "kinds.py").write_text(
        "class Tune:\n    kind: Literal['tune'] = 1\nclass Rl:\n    kind: Literal['rl'] = 1\n"
    )
    (package / "convert" / "theirs.py").write_text("x = draft['kind'] == 'rl'\n")
    (package / "uses.py").write_text(
        "NAMES = ('tune', 'rl', 'other')\n"
        "WORDS = {'text': 1, 'labels': 2}\n"
        "match stage.kind:\n"
        "    case 'rl' | 'more': ...\n"
        "a = kind in NAMES or 'rl' in words\n"
        "b = WORDS[use.role] + WORDS['text']\n"
        "c = data_role != 'text' or tuning_role == 'labels'\n"
        "d = raw.get('kind') == 'tune' or verdict.kind == 'signal'\n"
    )
    tree = read_tree(tmp_path, ["recipes"])
    found = sorted((site.line, site.name) for site in stand_in_sites(tree, "stage classes"))
    assert found == [(1, "rl"), (1, "tune"), (2, "labels"), (2, "text"), (4, "rl"), (7, "text"), (8, "tune")]
    (outside,) = stand_in_sites(tree, "stage classes", outside=True)
    assert (outside.module, outside.name) == ("recipes.convert.theirs", "rl")
    assert {site.name for site in stand_in_sites(tree, "family names")} == {"labels"}
