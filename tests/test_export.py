"""What `helpers.export` prints, takes over, and refuses.

.venv/bin/python -m pytest tests/test_export.py
"""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output

from helpers import export

IMPORTS = "# %%\nimport json\nimport math\n\nimport numpy as np\n\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An empty package to print into."""
    folder = tmp_path / "helpers"
    folder.mkdir()
    return folder


def write_script(package: Path, text: str) -> Path:
    script = package.parent / "story.py"
    script.write_text(text)
    return script


def test_module_is_printed_with_the_imports_that_it_uses(package: Path):
    cells = (
        "# %%\n#| export shapes\nSIDES = 4\n\n"
        "# %%\nprint(1)\n\n"
        "# %%\n#| export shapes\ndef root(x):\n    return math.sqrt(x)\n"
    )
    export.write_modules(write_script(package, IMPORTS + cells), package)
    assert (package / "shapes.py").read_text() == (
        '"""Printed from story.py: edit the script, then run `make sync`."""\n\n'
        "import math\n\n"
        "SIDES = 4\n\n\n"
        "def root(x):\n"
        "    return math.sqrt(x)\n"
    )


def test_sibling_is_imported(package: Path):
    cells = (
        "# %%\n#| export shapes\nSIDES = 4\n\n\ndef unused():\n    return 1\n\n\n"
        "# %%\n#| export areas\ndef area(side):\n    return np.power(side, SIDES)\n"
    )
    export.write_modules(write_script(package, IMPORTS + cells), package)
    assert (package / "areas.py").read_text() == (
        '"""Printed from story.py: edit the script, then run `make sync`."""\n\n'
        "import numpy as np\n\n"
        "from helpers.shapes import SIDES\n\n\n"
        "def area(side):\n"
        "    return np.power(side, SIDES)\n"
    )


def test_module_with_main_is_a_command(package: Path):
    cells = (
        "# %%\n#| export shapes\nSIDES = 4\n\n\ndef main():\n    print(SIDES)\n\n\n# %%\n#| export areas\nSIZE = 1\n"
    )
    export.write_modules(write_script(package, cells), package)
    ending = '\n\ndef main():\n    print(SIDES)\n\n\nif __name__ == "__main__":\n    main()\n'
    assert (package / "shapes.py").read_text().endswith(ending)
    assert "__main__" not in (package / "areas.py").read_text()


def test_second_printing_changes_nothing(package: Path, capsys: pytest.CaptureFixture):
    script = write_script(package, "# %%\n#| export shapes\nSIDES = 4\n")
    export.write_modules(script, package)
    export.write_modules(script, package)
    assert capsys.readouterr().out == "printed shapes.py\n"


def test_conditional_import_stays_in_the_script(package: Path):
    script = write_script(package, "# %%\nimport sys\n\nif 'colab' in sys.modules:\n    import subprocess\n")
    assert export.top_level_imports(script) == ["import sys"]


def test_variable_of_the_notebook_is_refused(package: Path):
    cells = "# %%\nmodel = 1\n\n# %%\n#| export shapes\ndef answer():\n    return model\n"
    message = r"helpers/shapes\.py: undefined \(F821\): model\. .*pass it as an argument, or export its definition"
    with pytest.raises(SystemExit, match=message):
        export.write_modules(write_script(package, cells), package)
    assert list(package.iterdir()) == []


@pytest.mark.parametrize(
    "statement",
    [
        "print('hello')",
        "import os",
        "for _ in []:\n    pass",
        "np.pi = 3",
        "if True:\n    x = 1",
        "SIDES += 1",
        "'A docstring.'",
    ],
)
def test_anything_but_a_definition_is_refused(package: Path, statement: str):
    script = write_script(package, f"# %%\n#| export shapes\nSIDES = 4\n{statement}\n")
    with pytest.raises(SystemExit, match="an export cell of `shapes` may only define; move elsewhere: "):
        export.write_modules(script, package)


def test_name_exported_twice_is_refused(package: Path):
    script = write_script(package, "# %%\n#| export shapes\nSIDES = 4\n\n# %%\n#| export areas\nSIDES = 5\n")
    with pytest.raises(SystemExit, match="`SIDES` is exported twice, to `shapes` and to `areas`"):
        export.write_modules(script, package)


@pytest.mark.parametrize(
    "mark", ["#| exports shapes", "#| export", "#|export shapes", "# | export shapes", "x = 1\n#| export x"]
)
def test_misspelt_mark_is_refused(package: Path, mark: str):
    script = write_script(package, f"# %%\n{mark}\nSIDES = 4\n")
    with pytest.raises(SystemExit, match=r"must open with `#\| export <module>`"):
        export.write_modules(script, package)


def test_module_written_by_hand_is_not_overwritten(package: Path):
    (package / "shapes.py").write_text('"""Mine."""\n')
    script = write_script(package, "# %%\n#| export shapes\nSIDES = 4\n")
    with pytest.raises(SystemExit, match=r"shapes\.py is written by hand: choose another name"):
        export.write_modules(script, package)
    assert (package / "shapes.py").read_text() == '"""Mine."""\n'


def test_orphan_is_deleted_and_hand_written_modules_stay(package: Path):
    (package / "mine.py").write_text('"""Mine."""\n')
    export.write_modules(write_script(package, "# %%\n#| export shapes\nSIDES = 4\n"), package)
    export.write_modules(write_script(package, "# %%\nprint(1)\n"), package)
    assert [path.name for path in package.iterdir()] == ["mine.py"]


# Outputs

STORY = '# %% [markdown]\n# # Title\n\n# %% tags=["parameters"]\nSTEPS = 100\n\n# %%\nprint(STEPS)\n'
WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "0%"}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script and its notebook, not executed yet."""
    script = tmp_path / "story.py"
    script.write_text(STORY)
    jupytext.write(jupytext.read(script), script.with_suffix(".ipynb"))
    return script


def execute(script: Path, printed: str = "3\n") -> Path:
    """The notebook as papermill leaves it after running with STEPS = 3, without the wait for a kernel."""
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    notebook.cells.insert(2, new_code_cell("STEPS = 3", metadata={"tags": ["injected-parameters"]}))
    notebook.metadata["papermill"] = {"parameters": {"STEPS": 3}}
    for count, cell in enumerate(notebook.cells[1:], start=1):
        cell.execution_count = count
        cell.metadata["papermill"] = {"status": "completed"}
    notebook.cells[3].outputs = [new_output("display_data", WIDGET), new_output("stream", name="stdout", text=printed)]
    nbformat.write(notebook, script.parent / "executed.ipynb")
    return script.parent / "executed.ipynb"


def test_outputs_are_taken_over(script: Path):
    export.take_outputs(execute(script), script)
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert [cell.source for cell in notebook.cells] == ["# Title", "STEPS = 100", "print(STEPS)"]
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 3]
    assert notebook.cells[1].outputs == []
    assert notebook.cells[2].outputs == [{"output_type": "stream", "name": "stdout", "text": "3\n"}]


def test_nothing_of_papermill_is_taken_over(script: Path):
    export.take_outputs(execute(script), script)
    text = script.with_suffix(".ipynb").read_text()
    assert "papermill" not in text
    assert "injected-parameters" not in text


def test_digest_of_the_code_is_stored(script: Path):
    export.take_outputs(execute(script), script)
    digest = nbformat.read(script.with_suffix(".ipynb"), as_version=4).metadata["executed_code_digest"]
    # printf '["STEPS = 100", "print(STEPS)"]' | sha256sum
    assert digest == "415bddca5e94df4e6c1e60d3e407989064f4ef312e290eb012b3f916f96251b5"


def test_outputs_of_an_edited_script_are_refused(script: Path):
    executed = execute(script)
    script.write_text(STORY.replace("print(STEPS)", "print(STEPS + 1)"))
    with pytest.raises(SystemExit, match=r"story\.py and its notebook differ: run `make sync`, then `make notebook`"):
        export.take_outputs(executed, script)


def test_outputs_of_other_code_are_refused(script: Path):
    executed = execute(script)
    script.write_text(STORY.replace("print(STEPS)", "print(STEPS + 1)"))
    jupytext.write(jupytext.read(script), script.with_suffix(".ipynb"))
    before = script.with_suffix(".ipynb").read_text()
    with pytest.raises(SystemExit, match=r"other code than story\.py: run `make notebook`"):
        export.take_outputs(executed, script)
    assert script.with_suffix(".ipynb").read_text() == before


@pytest.mark.parametrize("status", ["pending", "running", "failed"])
def test_unfinished_run_is_refused(script: Path, status: str):
    executed = execute(script)
    executed.write_text(executed.read_text().replace('"completed"', f'"{status}"'))
    with pytest.raises(SystemExit, match=r"executed\.ipynb is not a finished run of papermill: run `make notebook`"):
        export.take_outputs(executed, script)


def test_large_outputs_are_refused(script: Path):
    with pytest.raises(SystemExit, match=r"more than 3,000,000: print or draw less"):
        export.take_outputs(execute(script, printed="x" * 3_000_000), script)
