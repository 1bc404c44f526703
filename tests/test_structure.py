"""The rules of the tree: imports point one way, and the README shows the files that are there."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "sedd_megatron"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# What a file may import from: its own level and the ones below. model and data do not know each other.
LEVEL = {"launcher": -2, "errors": -1, "preset_files": -0.5, "options": 0, "megatron_flags": 0, "output_files": 0,
         "wording": 0, "run_files": 0, "diffusion": 0, "training_config": 1, "config": 2, "training_schedule": 2,
         "layout_rules": 2.5,
         "arguments": 3, "parallel": 3.5, "model": 4, "data": 4, "training": 5, "generation": 5, "evaluation": 5,
         "reporting": 5, "planning": 5.5}  # fmt: skip
COMMANDS = 6


def room_of(module: str) -> str:
    """sedd_megatron.data.windows -> data; sedd_megatron.generate -> generate."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own_room = room_of("sedd_megatron." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    for module in imported_modules(path):
        if not module.startswith("sedd_megatron."):
            continue
        room = room_of(module)
        assert room == own_room or LEVEL.get(room, COMMANDS) < LEVEL.get(own_room, COMMANDS) or (
            own_room == "__init__" or LEVEL.get(own_room, COMMANDS) == COMMANDS
        ), f"{path.name} in {own_room} imports {module}"  # fmt: skip


@pytest.mark.parametrize("path", sorted((PACKAGE / "diffusion").glob("*.py")), ids=lambda p: p.name)
def test_the_maths_knows_torch_alone(path):
    for module in imported_modules(path):
        top = module.split(".")[0]
        assert top != "megatron"
        assert not module.startswith("sedd_megatron.") or module.startswith("sedd_megatron.diffusion"), module


def test_readme_tree_names_every_file_and_no_other():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## The tree\n.*?```text\n(.*?)```", readme, re.DOTALL).group(1)
    named = set(re.findall(r"\b[\w.-]+\.(?:py|sh|yaml)\b", tree))
    files = [p for folder in ("sedd_megatron", "examples") for p in (REPOSITORY / folder).rglob("*")]
    present = {p.name for p in files if p.suffix in (".py", ".sh", ".yaml") and p.name != "__init__.py"} | {"setup.py"}
    assert named - {"run.sh"} == present


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name
