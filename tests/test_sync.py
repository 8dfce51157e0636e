"""The scripts are written by hand; the notebooks, the printed modules and the outputs follow from them.

.venv/bin/python -m pytest tests/test_sync.py
"""

import ast
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

from helpers.export import (
    LARGEST_NOTEBOOK,
    PACKAGE,
    ROOT,
    SCRIPT,
    code_digest,
    export_cells,
    is_printed,
    printed_modules,
    top_level_imports,
    write_modules,
)

NOTEBOOKS = ROOT / "notebooks"
PAIRED = [SCRIPT, *sorted(NOTEBOOKS.glob("*.py"))]

SMALL_SCRIPT = """\
# %% [markdown]
# # A small story

# %%
import math

# %% tags=["parameters"]
STEPS = 100

# %%
#| export shapes
def circle(radius):
    return math.pi * radius**2


# %%
circle(STEPS)
"""

# Imports one module per child of a process that has loaded the packages of the story, but no helper: loading those
# anew for each module would take most of a minute.
IMPORT_ALONE = """
import importlib, os, sys
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module(module)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{module} cannot be imported alone")
"""


def check_modules(script: Path, package: Path) -> None:
    """Every printed module is what the script prints now, and none outlives its cells."""
    pages = {package / f"{module}.py": text for module, text in printed_modules(script).items()}
    orphans = sorted(path.name for path in set(filter(is_printed, package.glob("*.py"))) - set(pages))
    assert not orphans, f"no cell of {script.name} exports to {orphans}: run `make sync`, which deletes them"
    stale = sorted(path.name for path, text in pages.items() if not path.exists() or path.read_text() != text)
    assert not stale, f"{stale} are not what {script.name} prints: edit the script only, then run `make sync`"


def cells(path: Path) -> list[tuple[str, str, list[str]]]:
    """What a script and its notebook must have in common."""
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in jupytext.read(path).cells]


def check_notebook(script: Path) -> None:
    """The notebook beside a script holds the script's cells."""
    notebook = script.with_suffix(".ipynb")
    assert notebook.exists(), f"{notebook.name} is missing: run `make sync`"
    assert cells(notebook) == cells(script), (
        f"{script.name} and {notebook.name} differ: "
        "run `make sync` if you edited the script, `make from-notebook` if you edited the notebook"
    )


def check_outputs(script: Path) -> None:
    """The outputs in a script's notebook came from a run of exactly this code."""
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    executed = notebook.metadata.get("executed_code_digest")
    assert executed == code_digest(notebook), (
        f"the outputs for {script.name} are not of this code: run `make notebook`"
    )


def imports_helpers(code: str) -> bool:
    """Whether code imports `helpers` in any way, at any depth."""
    modules = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append("helpers" if node.level else node.module)  # a relative import has a package around it
    return any(module.partition(".")[0] == "helpers" for module in modules)


def test_modules_follow_from_the_script():
    check_modules(SCRIPT, PACKAGE)


@pytest.mark.parametrize("script", PAIRED, ids=lambda path: path.stem)
def test_notebook_follows_from_its_script(script: Path):
    check_notebook(script)


def test_no_notebook_without_a_script():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {path.stem for path in NOTEBOOKS.glob("*.py")}


def test_parameters_cell_is_tagged():
    for path in (SCRIPT, SCRIPT.with_suffix(".ipynb")):
        assert [tags for _, _, tags in cells(path) if tags] == [["parameters"]]


def test_outputs_belong_to_the_code():
    check_outputs(SCRIPT)


@pytest.mark.parametrize("script", PAIRED, ids=lambda path: path.stem)
def test_notebook_is_small(script: Path):
    assert script.with_suffix(".ipynb").stat().st_size < LARGEST_NOTEBOOK


def test_script_stands_alone():
    assert not imports_helpers(SCRIPT.read_text())


@pytest.mark.slow
def test_every_module_imports_alone():
    program = "\n".join(top_level_imports(SCRIPT)) + IMPORT_ALONE
    modules = [f"helpers.{module}" for module in export_cells(SCRIPT)]
    run = subprocess.run([sys.executable, "-c", program, *modules], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# The checks themselves, on a house that is broken on purpose


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A small script with its notebook, its outputs and its package, all in step."""
    script = tmp_path / "story.py"
    script.write_text(SMALL_SCRIPT)
    (tmp_path / "helpers").mkdir()
    write_modules(script, tmp_path / "helpers")
    notebook = jupytext.read(script)
    notebook.metadata["executed_code_digest"] = code_digest(notebook)
    jupytext.write(notebook, script.with_suffix(".ipynb"))
    return script


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_checks_pass_when_all_is_in_step(script: Path):
    check_modules(script, script.parent / "helpers")
    check_notebook(script)
    check_outputs(script)


def test_edited_module_is_found_and_mended(script: Path):
    package = script.parent / "helpers"
    edit(package / "shapes.py", "radius**2", "radius**3")
    with pytest.raises(AssertionError, match=r"shapes\.py.* edit the script only, then run `make sync`"):
        check_modules(script, package)
    write_modules(script, package)
    assert "radius**2" in (package / "shapes.py").read_text()
    check_modules(script, package)


def test_edited_script_is_found(script: Path):
    edit(script, "radius**2", "radius**3")
    with pytest.raises(AssertionError, match="run `make sync`"):
        check_modules(script, script.parent / "helpers")
    with pytest.raises(AssertionError, match="run `make sync` if you edited the script"):
        check_notebook(script)


def test_edited_notebook_is_found(script: Path):
    edit(script.with_suffix(".ipynb"), "circle(STEPS)", "circle(2)")
    check_modules(script, script.parent / "helpers")
    with pytest.raises(AssertionError, match="`make from-notebook` if you edited the notebook"):
        check_notebook(script)


def test_lost_tag_is_found(script: Path):
    edit(script.with_suffix(".ipynb"), '"parameters"', '"other"')
    with pytest.raises(AssertionError, match="make from-notebook"):
        check_notebook(script)


def test_missing_notebook_is_found(script: Path):
    script.with_suffix(".ipynb").unlink()
    with pytest.raises(AssertionError, match=r"story\.ipynb is missing: run `make sync`"):
        check_notebook(script)


def test_orphan_is_found_and_mended(script: Path):
    package = script.parent / "helpers"
    edit(script, "#| export shapes", "#| export areas")
    with pytest.raises(AssertionError, match=r"\['shapes\.py'\]: run `make sync`, which deletes them"):
        check_modules(script, package)
    write_modules(script, package)
    assert sorted(path.name for path in package.iterdir()) == ["areas.py"]


def test_outputs_of_other_code_are_found(script: Path):
    edit(script.with_suffix(".ipynb"), "circle(STEPS)", "circle(2)")
    with pytest.raises(AssertionError, match="run `make notebook`"):
        check_outputs(script)


def test_prose_does_not_age_the_outputs(script: Path):
    edit(script.with_suffix(".ipynb"), "A small story", "A better title")
    check_outputs(script)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import helpers", True),
        ("import json, helpers.boxes as boxes", True),
        ("from helpers import boxes", True),
        ("from helpers.boxes import to_grid", True),
        ("def late():\n    if True:\n        from helpers.boxes import to_grid", True),
        ("from . import boxes", True),
        ("import helpers_of_others\nfrom os import path\nhelpers = 1", False),
    ],
)
def test_imports_of_helpers_are_found(code: str, found: bool):
    assert imports_helpers(code) is found
