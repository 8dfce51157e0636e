"""The scripts are written by hand; the notebooks, the printed modules and the outputs follow from them.

.venv/bin/python -m pytest tests/test_sync.py
"""

import ast
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jupytext
import pytest
from jupytext.cli import jupytext as jupytext_command
from nbformat.v4 import new_output

from helpers.export import (
    LARGEST_NOTEBOOK,
    PACKAGE,
    ROOT,
    SCRIPT,
    SCRIPTS,
    code_cells,
    code_digest,
    find_orphans,
    find_problem,
    lasting_outputs,
    note_synced,
    printed_modules,
    read_all_modules,
    refresh_command,
    refuse_lost_edit,
    top_level_imports,
    write_modules,
)

STORY = """\
# %% [markdown]
# # A small story

# %%
import math

# %% tags=["parameters"]
STEPS = 100

# %%
#| export shapes: Shapes without corners.
def circle(radius):
    return math.pi * radius**2


# %%
circle(STEPS)
"""

TOPIC = """\
# %% [markdown]
# # A small topic

# %%
from helpers.shapes import circle

# %% tags=["parameters"]
HEIGHT = 10

# %%
#| export volumes: What stands on shapes.
def cylinder(radius, height):
    return circle(radius) * height


# %%
cylinder(1, HEIGHT)
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


def check_modules(scripts: Sequence[Path], package: Path) -> None:
    """Every printed module is what its script prints now, and none outlives its cells."""
    pages = {package / f"{module}.py": text for module, text in printed_modules(scripts).items()}
    orphans = [path.name for path in find_orphans(package, pages)]
    assert not orphans, f"no cell exports to {orphans}: run `make sync`, which deletes them"
    stale = sorted(path.name for path, text in pages.items() if not path.exists() or path.read_text() != text)
    assert not stale, f"{stale} are not what their scripts print: edit the scripts only, then run `make sync`"


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


def check_parameters(script: Path) -> None:
    """One cell is tagged, as the one whose settings papermill replaces."""
    tagged = [tags for _, _, tags in cells(script) if tags]
    assert tagged == [["parameters"]], f'{script.name} needs one cell `# %% tags=["parameters"]`, then run `make sync`'


def check_outputs(script: Path) -> None:
    """The outputs in a script's notebook came from a run of exactly this code."""
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    executed = notebook.metadata.get("executed_code_digest")
    assert executed == code_digest(notebook), (
        f"the outputs for {script.name} are not of this code: run `{refresh_command(script)}`"
    )


def check_outputs_are_plain(script: Path) -> None:
    """The outputs show no error, no warning, no widget, no control character and each progress bar once."""
    for number, cell in enumerate(code_cells(jupytext.read(script.with_suffix(".ipynb"))), start=1):
        odd = find_problem(cell) or cell.outputs != lasting_outputs(cell)
        assert not odd, (
            f"code cell {number} of {script.stem}.ipynb shows what no reader needs: run `{refresh_command(script)}`"
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


each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def test_modules_follow_from_the_scripts():
    check_modules(SCRIPTS, PACKAGE)


@each_script
def test_notebook_follows_from_its_script(script: Path):
    check_notebook(script)


@each_script
def test_parameters_cell_is_tagged(script: Path):
    check_parameters(script)


@each_script
def test_outputs_belong_to_the_code(script: Path):
    check_outputs(script)


@each_script
def test_outputs_are_plain(script: Path):
    check_outputs_are_plain(script)


@each_script
def test_sync_leaves_no_difference(script: Path, tmp_path: Path):
    """`make sync` writes a committed notebook as `make notebook` left it."""
    for path in (script, script.with_suffix(".ipynb"), ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    notebook = tmp_path / script.with_suffix(".ipynb").name
    before = notebook.read_text()
    jupytext_command(["--quiet", "--update", "--to", "ipynb", str(tmp_path / script.name)])
    assert notebook.read_text() == before, f"{notebook.name} is not as `make sync` writes it: run `make sync`"


@each_script
def test_notebook_is_small(script: Path):
    assert script.with_suffix(".ipynb").stat().st_size < LARGEST_NOTEBOOK


def test_no_notebook_without_a_script():
    notebooks = [*ROOT.glob("*.ipynb"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(notebooks) == sorted(script.with_suffix(".ipynb") for script in SCRIPTS)


def test_story_stands_alone():
    assert not imports_helpers(SCRIPT.read_text())


@pytest.mark.slow
def test_every_module_imports_alone():
    program = "\n".join(top_level_imports(SCRIPT)) + IMPORT_ALONE
    modules = [f"helpers.{module.name}" for module in read_all_modules(SCRIPTS)]
    run = subprocess.run([sys.executable, "-c", program, *modules], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# The checks themselves, on a house that is broken on purpose


@pytest.fixture
def scripts(tmp_path: Path) -> list[Path]:
    """A small story and a small topic with their notebooks, their outputs and their modules, all in step."""
    scripts = [tmp_path / "story.py", tmp_path / "notebooks/04_volumes.py"]
    for folder in ("notebooks", "helpers"):
        (tmp_path / folder).mkdir()
    for script, text in zip(scripts, (STORY, TOPIC), strict=True):
        script.write_text(text)
        notebook = jupytext.read(script)
        notebook.metadata["executed_code_digest"] = code_digest(notebook)
        jupytext.write(notebook, script.with_suffix(".ipynb"))
    write_modules(scripts, tmp_path / "helpers")
    return scripts


@pytest.fixture
def story(scripts: list[Path]) -> Path:
    return scripts[0]


@pytest.fixture
def package(story: Path) -> Path:
    return story.parent / "helpers"


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_checks_pass_when_all_is_in_step(scripts: list[Path], package: Path):
    check_modules(scripts, package)
    assert sorted(path.name for path in package.iterdir()) == ["shapes.py", "volumes.py"]
    for script in scripts:
        check_notebook(script)
        check_parameters(script)
        check_outputs(script)
        check_outputs_are_plain(script)


@pytest.mark.parametrize(
    ("module", "old", "new"), [("shapes", "radius**2", "radius**3"), ("volumes", "* height", "+ height")]
)
def test_edited_module_is_found_and_mended(scripts: list[Path], package: Path, module: str, old: str, new: str):
    edit(package / f"{module}.py", old, new)
    with pytest.raises(AssertionError, match=rf"'{module}\.py'.* edit the scripts only, then run `make sync`"):
        check_modules(scripts, package)
    write_modules(scripts, package)
    assert old in (package / f"{module}.py").read_text()
    check_modules(scripts, package)


@pytest.mark.parametrize(
    ("number", "old", "new"), [(0, "radius**2", "radius**3"), (1, "* height", "+ height")], ids=["story", "topic"]
)
def test_edited_script_is_found(scripts: list[Path], package: Path, number: int, old: str, new: str):
    edit(scripts[number], old, new)
    with pytest.raises(AssertionError, match="run `make sync`"):
        check_modules(scripts, package)
    with pytest.raises(AssertionError, match="run `make sync` if you edited the script"):
        check_notebook(scripts[number])
    check_notebook(scripts[1 - number])


@pytest.mark.parametrize(
    ("number", "old", "new"),
    [(0, "circle(STEPS)", "circle(2)"), (1, "cylinder(1, HEIGHT)", "cylinder(2, HEIGHT)")],
    ids=["story", "topic"],
)
def test_edited_notebook_is_found(scripts: list[Path], package: Path, number: int, old: str, new: str):
    edit(scripts[number].with_suffix(".ipynb"), old, new)
    check_modules(scripts, package)
    with pytest.raises(AssertionError, match="`make from-notebook` if you edited the notebook"):
        check_notebook(scripts[number])
    check_notebook(scripts[1 - number])


def test_an_edit_that_the_other_side_lacks_is_not_overwritten(story: Path):
    notebook = story.with_suffix(".ipynb")
    refuse_lost_edit(story, "notebook")  # nothing was noted yet
    note_synced(story)
    edit(story, "circle(STEPS)", "circle(2)")
    refuse_lost_edit(story, "notebook")  # `make sync` brings the script's edit into the notebook
    with pytest.raises(SystemExit, match=r"story.py .* cell 5 \(`circle\(2\)`\): run `make sync`, or undo"):
        refuse_lost_edit(story, "script")
    edit(notebook, "STEPS = 100", "STEPS = 5")
    with pytest.raises(SystemExit, match=r"story.ipynb .* cell 3 \(`STEPS = 5`\): run `make from-notebook`"):
        refuse_lost_edit(story, "notebook")
    jupytext_command(["--quiet", "--to", "py:percent", str(notebook)])
    refuse_lost_edit(story, "notebook")  # both say the same
    assert "STEPS = 5" in story.read_text()


@pytest.mark.parametrize(
    ("number", "old", "command"),
    [(0, "circle(STEPS)", "make notebook"), (1, "cylinder(1, HEIGHT)", "make topic NAME=04_volumes")],
    ids=["story", "topic"],
)
def test_outputs_of_other_code_are_found(scripts: list[Path], number: int, old: str, command: str):
    edit(scripts[number].with_suffix(".ipynb"), old, "1 + 1")
    with pytest.raises(AssertionError, match=f"run `{command}`"):
        check_outputs(scripts[number])
    check_outputs(scripts[1 - number])


def test_prose_does_not_age_the_outputs(story: Path):
    edit(story.with_suffix(".ipynb"), "A small story", "A better title")
    check_outputs(story)


@pytest.mark.parametrize("text", ["\rtraining:  50%\rtraining: 100%\n", "story.py:1: UserWarning: old\n"])
def test_output_that_no_reader_needs_is_found(story: Path, text: str):
    notebook = jupytext.read(story.with_suffix(".ipynb"))
    notebook.cells[2].outputs = [new_output("stream", name="stderr", text=text)]
    jupytext.write(notebook, story.with_suffix(".ipynb"))
    with pytest.raises(AssertionError, match=r"code cell 2 of story\.ipynb shows .*: run `make notebook`"):
        check_outputs_are_plain(story)


def test_lost_tag_is_found(story: Path):
    edit(story.with_suffix(".ipynb"), '"parameters"', '"other"')
    with pytest.raises(AssertionError, match="make from-notebook"):
        check_notebook(story)
    edit(story, '"parameters"', '"other"')
    with pytest.raises(AssertionError, match=r"story\.py needs one cell .*, then run `make sync`"):
        check_parameters(story)


def test_missing_notebook_is_found(story: Path):
    story.with_suffix(".ipynb").unlink()
    with pytest.raises(AssertionError, match=r"story\.ipynb is missing: run `make sync`"):
        check_notebook(story)


def test_orphan_is_found_and_mended(scripts: list[Path], package: Path):
    edit(scripts[1], "#| export volumes", "#| export bodies")
    with pytest.raises(AssertionError, match=r"\['volumes\.py'\]: run `make sync`, which deletes them"):
        check_modules(scripts, package)
    write_modules(scripts, package)
    assert sorted(path.name for path in package.iterdir()) == ["bodies.py", "shapes.py"]


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
