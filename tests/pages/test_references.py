"""What the pages name: links, files, keys, parts, Python names and words of the code, and the tree of docs/architecture.md."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import laconic
from laconic.modules import registry
from laconic.modules.config import CompressionConfig, PartConfig
from laconic.trainer.recipe.files import shipped

from .keys import BLOCKS, default, exists
from .markdown import PAGES, ROOT, Page

README = PAGES[0]
ARCHITECTURE = next(page for page in PAGES if page.path.stem == "architecture")
ADDING = next(page for page in PAGES if page.path.stem == "adding_a_method")
CODE = ("modules", "trainer", "data", "recipes", "scripts")
TREE = (*CODE, "tests", "docs")
# What pages name and no code does: files of other programs, examples of what a reader writes, code that a model wrote.
OTHERS = {"mlp", "auth", "login", "freight", "offline", "minilm", "facebook", "mae", "save_strategy", "min_pixels", "max_pixels"} | {
    "video_token_id", "file_name", "mask_file_name", "outside_part", "docs", "grad_norm_routers"
}  # fmt: skip
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.stem)


@functools.cache
def files() -> frozenset[str]:
    """Every file and folder, by its path from the root."""
    found = {path.relative_to(ROOT) for top in TREE for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts}
    return frozenset(map(str, {*found, *map(Path, TREE), Path("README.md"), Path("pyproject.toml")}))


@functools.cache
def texts() -> dict[str, str]:
    """Code and recipes, by path from the root."""
    paths = [ROOT / name for name in files() if name.startswith(CODE) and (ROOT / name).is_file()]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (*paths, ROOT / "pyproject.toml")}


@functools.cache
def words() -> frozenset[str]:
    """Every word in code and recipes, names of files included."""
    return frozenset(word for text in (*texts().values(), *files(), *laconic.__all__) for word in re.findall(r"\w+", text))


@functools.cache
def homes() -> dict[str, str]:
    """Path of the file that has each class at its top; of two of a name, the one in modules/."""
    found = [(path, name) for path, text in texts().items() for name in re.findall(r"^class (\w+)", text, re.MULTILINE)]
    return {name: path for path, name in sorted(found, key=lambda place: place[0].startswith("modules/"))}


@functools.cache
def body(name: str) -> ast.ClassDef:
    """A class of this project by its name."""
    tree = ast.parse(texts()[homes()[name]])
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def has(name: str, member: str) -> bool:
    """True if a class, or one that it derives from, has a member; of classes of other packages too."""
    if name not in homes():
        return True
    parts = list(ast.walk(body(name)))
    own = {part.name for part in parts if isinstance(part, ast.FunctionDef)} | {part.id for part in parts if isinstance(part, ast.Name)}
    own |= {part.attr for part in parts if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)}
    bases = [base.id for base in body(name).bases if isinstance(base, ast.Name) and base.id in homes()]
    return member in own or any(has(base, member) for base in bases)


@each_page
def test_links_lead_to_files_and_headings(page: Page) -> None:
    headings = {other.path: other.anchors for other in PAGES}
    for link in page.links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        assert path.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in headings[path], f"{page.name}: {link}"


@each_page
def test_files_that_a_page_names_exist(page: Page) -> None:
    for span in page.spans:
        for name in re.findall(rf"(?<![\w./])(?:{'|'.join(TREE)})/[\w./-]*|(?<![\w./])[\w/]+\.py\b", span):
            path = name.rstrip("/.")
            # data/ and model/ are folders of a run too; capital letters stand for a name, and mlp.py is what the page adds.
            if path not in ("data", "model") and not re.search("[A-Z]", path) and "mlp" not in path:
                assert any(f"/{file}".endswith(f"/{path}") for file in files()), f"{page.name}: {span}"


@each_page
def test_keys_that_a_page_names_exist(page: Page) -> None:
    for span in page.spans:
        key = re.match(r"([a-z_]+\.[a-z_0-9.]+)(?:$|=|: )", span)
        if key and key[1].split(".")[0] in BLOCKS and not key[1].endswith((".py", ".json", ".safetensors")):
            assert exists(key[1]), f"{page.name}: {span}"


def test_tables_of_keys_state_their_defaults() -> None:
    tables = [
        (page, rows) for page in PAGES for rows in re.findall(r"^\| key \| default \| .*\n\|[-|]*\n((?:\|.*\n)+)", page.prose, re.MULTILINE)
    ]
    assert len(tables) > 1
    for page, first, stated in ((page, *row.split(" | ")[:2]) for page, rows in tables for row in rows.splitlines()):
        keys: list[str] = []
        for key in re.findall(r"`([A-Za-z_.]+)`", first):
            # A key that begins with a dot is of the block of the one before it.
            keys.append(f"{keys[-1].rpartition('.')[0]}{key}" if key.startswith(".") else key)
            assert exists(keys[-1]), f"{page.name}: {first}"
        numbers = [float(number) for number in re.findall(r"(?<!\w)[0-9.]+\b", stated)]
        if len(numbers) == len(keys) and re.fullmatch(r"[\w ., ()]+", stated):
            assert numbers == [default(key) for key in keys], f"{page.name}: {first}"


def test_weights_of_regularizers_are_those_of_the_code() -> None:
    ratio = next(page for page in PAGES if page.path.stem == "ratio")
    stated = dict(re.findall(r"^\| `(\w+)` \| .* \| ([0-9.e-]+) \|$", ratio.prose, re.MULTILINE))
    made = {name: registry.build("regularizer", PartConfig(name)).weight for name in registry.part_names("regularizer")}
    assert {name: float(weight) for name, weight in stated.items()} == made


@each_page
def test_stages_and_recipes_in_a_page_are_valid(page: Page) -> None:
    for text in [*page.blocks("yaml"), *(span for span in page.spans if span.startswith("{"))]:
        try:
            block = yaml.safe_load(text)
        except yaml.YAMLError:
            continue
        if not isinstance(block, dict):
            continue
        if "layer" in block and "by" not in block:
            block.pop("…", None)
            block = {"compression": {"stages": [block]}}
        if "compression" in block:
            CompressionConfig.from_dict(block["compression"])
            assert set(block) <= {*BLOCKS, "base"}, f"{page.name}: {text}"
            assert block.get("base", "llm_finetune") in shipped()
            for stage in CompressionConfig.from_dict(block["compression"]).stages:
                for kind in ("scorer", "selector", "merger", "estimator", "shortcut"):
                    part = getattr(stage, kind)
                    assert part is None or part.name in (*registry.part_names(kind), "mlp"), f"{page.name}: {text}"
        for key, value in block.items():
            if isinstance(value, dict) and key in BLOCKS - {"compression"}:
                assert not [inner for inner in value if not exists(f"{key}.{inner}")], f"{page.name}: {text}"


@each_page
def test_names_in_a_page_are_names_of_the_code(page: Page) -> None:
    for span in page.spans:
        if span.startswith(("laconic ", "def ", "return ", "… return")):
            continue
        for name, member in re.findall(r"\b([A-Z]\w+)\.([a-z_]\w*)", span):
            assert has(name, member), f"{page.name}: {span}"
        for name in re.findall(r"\blaconic\.([a-zA-Z_]\w*)(?![\w/])", span):
            assert name in (*laconic.__all__, "modules", "yaml") or f"laconic.{name}" in groups(), f"{page.name}: {span}"
        for word in re.findall(r"[A-Za-z_]\w{2,}", span):
            # A suffix of a recipe's name stands beside that name.
            known = word in words() or word in OTHERS or word.isupper() or any(name.endswith(word) for name in shipped())
            assert known or word in ("_lora", "_rest", "qn1") or word.startswith("RECIPE_"), f"{page.name}: {span}"


def groups() -> set[str]:
    """Entry point groups of parts."""
    return {kind.group for kind in registry.KINDS.values()}


@each_page
def test_python_in_a_page_is_python_and_imports_what_exists(page: Page) -> None:
    for block in page.blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "laconic":
                assert {alias.name for alias in node.names} <= set(laconic.__all__), f"{page.name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("StageConfig", "BudgetConfig"):
                fields = {item.name for item in dataclasses.fields(getattr(laconic, node.func.id))}
                assert {keyword.arg for keyword in node.keywords} <= fields, f"{page.name}: {ast.unparse(node)}"


def _parts(node: ast.ClassDef) -> set[str]:
    """Methods and settings of a class, without docstrings and comments."""
    return {ast.unparse(part) for part in node.body if not isinstance(part, ast.Expr)}


def test_classes_shown_on_how_to_add_a_method_are_those_of_the_code() -> None:
    trees = [ast.parse(block) for block in ADDING.blocks("python")]
    shown = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "MlpScorer"]
    assert len(shown) > 4
    for node in shown:
        assert _parts(node) <= _parts(body(node.name)), f"{ADDING.name}: {node.name}"


def test_the_readme_lists_every_part() -> None:
    rows = {kind: line for kind in registry.KINDS for line in README.prose.splitlines() if line.startswith(f"| {kind} |")}
    listed: Any = {kind: sorted(re.findall(r"`(\w+)`", line)) for kind, line in rows.items()}
    assert listed == {kind: sorted(registry.part_names(kind)) for kind in registry.KINDS}


def test_the_tree_of_the_architecture_names_every_folder_and_the_files_that_it_describes() -> None:
    tree = next(block for block in ARCHITECTURE.blocks("") if "modules/" in block)
    named = set(re.findall(r"[\w.]+", tree))
    paths = [Path(name) for name in files()]
    gone = {name for name in named if name.endswith(".py") and name not in {path.name for path in paths}}
    # Folders whose files the tree describes one by one; families of backbones and rules are described together.
    told = {"modules", "modules/tokens", "modules/stages", "modules/budget", "modules/cost", "modules/decoding", "modules/checkpoints"}
    told |= {"trainer", "data"}
    missing = {
        str(path)
        for path in paths
        if (path.suffix == ".py" and path.name != "__init__.py" and str(path.parent) in told and path.name not in named)
        or ((ROOT / path).is_dir() and path.parts[0] != "docs" and path.name not in named)
        or (path.parent == Path("scripts") and not path.suffix and path.name not in named)
    }
    assert (gone, missing) == (set(), set())
