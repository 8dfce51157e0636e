"""What `helpers.export` prints, takes over, and refuses.

.venv/bin/python -m pytest tests/test_export.py
"""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output
from tqdm import tqdm

from helpers import export

IMPORTS = "# %%\nimport json\nimport math\n\nimport numpy as np\n\n"
SHAPES = "# %%\n#| export shapes: Shapes with sides.\nSIDES = 4\n\n\ndef unused():\n    return 1\n\n\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An empty package to print into."""
    folder = tmp_path / "helpers"
    folder.mkdir()
    return folder


def write_script(package: Path, text: str, name: str = "story") -> Path:
    script = package.parent / f"{name}.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(text)
    return script


def write_topic(package: Path, text: str, name: str = "04_areas") -> Path:
    return write_script(package, text, f"notebooks/{name}")


# Modules of one script


def test_module_is_printed_with_the_imports_that_it_uses(package: Path):
    cells = (
        "# %%\n#| export shapes: Shapes with sides.\nSIDES = 4\n\n"
        "# %%\nprint(1)\n\n"
        "# %%\n#| export shapes\ndef root(x):\n    return math.sqrt(x)\n"
    )
    export.write_modules([write_script(package, IMPORTS + cells)], package)
    assert (package / "shapes.py").read_text() == (
        '"""Shapes with sides.\n\n'
        "Printed from story.py: edit that, then run `make sync`.\n"
        '"""\n\n'
        "import math\n\n"
        "SIDES = 4\n\n\n"
        "def root(x):\n"
        "    return math.sqrt(x)\n"
    )


def test_sibling_is_imported(package: Path):
    cells = "# %%\n#| export areas: What shapes cover.\ndef area(side):\n    return np.power(side, SIDES)\n"
    export.write_modules([write_script(package, IMPORTS + SHAPES + cells)], package)
    assert (package / "areas.py").read_text() == (
        '"""What shapes cover.\n\n'
        "Printed from story.py: edit that, then run `make sync`.\n"
        '"""\n\n'
        "import numpy as np\n\n"
        "from helpers.shapes import SIDES\n\n\n"
        "def area(side):\n"
        "    return np.power(side, SIDES)\n"
    )


def test_module_with_main_is_a_command(package: Path):
    cells = (
        "# %%\n#| export shapes: Shapes.\nSIDES = 4\n\n\ndef main():\n    print(SIDES)\n\n\n"
        "# %%\n#| export areas: Areas.\nSIZE = 1\n"
    )
    export.write_modules([write_script(package, cells)], package)
    ending = '\n\ndef main():\n    print(SIDES)\n\n\nif __name__ == "__main__":\n    main()\n'
    assert (package / "shapes.py").read_text().endswith(ending)
    assert "__main__" not in (package / "areas.py").read_text()


def test_second_printing_changes_nothing(package: Path, capsys: pytest.CaptureFixture):
    script = write_script(package, SHAPES)
    export.write_modules([script], package)
    export.write_modules([script], package)
    assert capsys.readouterr().out == "printed shapes.py\n"


def test_conditional_import_stays_in_the_script(package: Path):
    script = write_script(package, "# %%\nimport sys\n\nif 'colab' in sys.modules:\n    import subprocess\n")
    assert export.top_level_imports(script) == ["import sys"]


def test_variable_of_the_notebook_is_refused(package: Path):
    cells = "# %%\nmodel = 1\n\n# %%\n#| export shapes: Shapes.\ndef answer():\n    return model\n"
    message = r"helpers/shapes\.py: undefined \(F821\): model\. .*pass it as an argument, or export its definition"
    with pytest.raises(SystemExit, match=message):
        export.write_modules([write_script(package, cells)], package)
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
    script = write_script(package, f"# %%\n#| export shapes: Shapes.\nSIDES = 4\n{statement}\n")
    with pytest.raises(SystemExit, match="an export cell of `shapes` may only define; move elsewhere: "):
        export.write_modules([script], package)


def test_name_exported_twice_is_refused(package: Path):
    script = write_script(package, SHAPES + "# %%\n#| export areas: Areas.\nSIDES = 5\n")
    with pytest.raises(SystemExit, match="`SIDES` is exported twice, to `shapes` and to `areas`"):
        export.write_modules([script], package)


@pytest.mark.parametrize(
    "mark",
    [
        "#| exports shapes",
        "#| export",
        "#|export shapes",
        "# | export shapes",
        "#| export shapes: no full stop",
        "#| export shapes Shapes with sides.",
        "x = 1\n#| export x",
    ],
)
def test_misspelt_mark_is_refused(package: Path, mark: str):
    script = write_script(package, f"# %%\n{mark}\nSIDES = 4\n")
    with pytest.raises(
        SystemExit, match=r"must open with `#\| export <module>` or `#\| export <module>: A sentence\.`"
    ):
        export.write_modules([script], package)


@pytest.mark.parametrize("sentences", [["", ""], ["", ": Shapes."], [": Shapes.", ": Forms."]])
def test_module_says_once_and_first_what_it_is_for(package: Path, sentences: list[str]):
    cells = [f"# %%\n#| export shapes{sentence}\nSIDE_{i} = {i}\n\n" for i, sentence in enumerate(sentences)]
    message = r"story\.py: the first cell of `shapes`, and no other, says .*: `#\| export shapes: What it is for\.`"
    with pytest.raises(SystemExit, match=message):
        export.write_modules([write_script(package, "".join(cells))], package)


def test_module_written_by_hand_is_not_overwritten(package: Path):
    (package / "shapes.py").write_text('"""Mine."""\n')
    with pytest.raises(SystemExit, match=r"shapes\.py is written by hand: choose another name"):
        export.write_modules([write_script(package, SHAPES)], package)
    assert (package / "shapes.py").read_text() == '"""Mine."""\n'


def test_printed_module_with_a_merge_conflict_is_printed_anew(package: Path):
    script = write_script(package, SHAPES)
    export.write_modules([script], package)
    printed = (package / "shapes.py").read_text()
    (package / "shapes.py").write_text(printed + "<<<<<<< HEAD\n")
    export.write_modules([script], package)
    assert (package / "shapes.py").read_text() == printed


def test_orphan_is_deleted_and_hand_written_modules_stay(package: Path):
    (package / "mine.py").write_text('"""Mine."""\n')
    export.write_modules([write_script(package, SHAPES)], package)
    export.write_modules([write_script(package, "# %%\nprint(1)\n")], package)
    assert [path.name for path in package.iterdir()] == ["mine.py"]


# Modules of several scripts

AREAS = "# %%\n#| export areas: What shapes cover.\ndef area(side):\n    return side**SIDES\n"


def test_topic_has_modules_of_its_own(package: Path):
    topic = write_topic(package, "# %%\nfrom helpers.shapes import SIDES, unused\n\n" + AREAS)
    export.write_modules([write_script(package, SHAPES), topic], package)
    assert sorted(path.name for path in package.iterdir()) == ["areas.py", "shapes.py"]
    assert (package / "areas.py").read_text() == (
        '"""What shapes cover.\n\n'
        "Printed from notebooks/04_areas.py: edit that, then run `make sync`.\n"
        '"""\n\n'
        "from helpers.shapes import SIDES\n\n\n"
        "def area(side):\n"
        "    return side**SIDES\n"
    )


def test_topic_uses_another_topic(package: Path):
    first = write_topic(package, AREAS.replace("SIDES", "2"))
    cells = "# %%\n#| export costs: Prices of areas.\ndef cost(side):\n    return 3 * area(side)\n"
    second = write_topic(package, "# %%\nfrom helpers.areas import area\n\n" + cells, name="06_costs")
    export.write_modules([write_script(package, SHAPES), first, second], package)
    assert "\nfrom helpers.areas import area\n" in (package / "costs.py").read_text()


def test_topic_without_the_import_is_refused(package: Path):
    message = r"helpers/areas\.py: `SIDES` is exported by story\.py\. .*`from helpers\.shapes import SIDES`"
    with pytest.raises(SystemExit, match=message):
        export.write_modules([write_script(package, SHAPES), write_topic(package, AREAS)], package)


def test_story_that_needs_a_topic_is_refused(package: Path):
    story = write_script(package, AREAS)
    topic = write_topic(package, SHAPES)
    message = r"helpers/areas\.py: `SIDES` is exported by 04_areas\.py\. .*The story stands alone: define it there"
    with pytest.raises(SystemExit, match=message):
        export.write_modules([story, topic], package)
    assert list(package.iterdir()) == []


def test_module_with_two_sources_is_refused(package: Path):
    topic = write_topic(package, "# %%\n#| export shapes: Other shapes.\nCORNERS = 4\n")
    with pytest.raises(
        SystemExit, match=r"`shapes` has two sources, story\.py and 04_areas\.py: export to it from one"
    ):
        export.write_modules([write_script(package, SHAPES), topic], package)


def test_name_exported_by_two_scripts_is_refused(package: Path):
    topic = write_topic(package, "# %%\n#| export areas: Areas.\nSIDES = 5\n")
    with pytest.raises(SystemExit, match="`SIDES` is exported twice, to `shapes` and to `areas`: rename one"):
        export.write_modules([write_script(package, SHAPES), topic], package)


def test_import_from_another_module_than_the_source_is_refused(package: Path):
    story = write_script(package, SHAPES + "# %%\n#| export areas: Areas.\nSIZE = 1\n")
    topic = write_topic(package, "# %%\nfrom helpers.shapes import SIZE as size\n")
    message = r"04_areas\.py imports `SIZE` from `shapes`; it is not exported to that, but to `areas`"
    with pytest.raises(SystemExit, match=message):
        export.write_modules([story, topic], package)


def test_import_from_a_module_of_its_own_is_refused(package: Path):
    topic = write_topic(package, "# %%\nfrom helpers.shapes import SIDES\n\n" + SHAPES)
    message = r"04_areas\.py exports to `shapes` and imports `SIDES` from it: drop the import"
    with pytest.raises(SystemExit, match=message):
        export.write_modules([write_script(package, ""), topic], package)


def test_orphan_of_a_topic_is_deleted(package: Path, capsys: pytest.CaptureFixture):
    story, topic = write_script(package, SHAPES), write_topic(package, AREAS.replace("SIDES", "2"))
    export.write_modules([story, topic], package)
    export.write_modules([story], package)
    assert [path.name for path in package.iterdir()] == ["shapes.py"]
    assert capsys.readouterr().out.endswith("deleted areas.py: no cell exports to it\n")


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


def stream(text: str, name: str = "stdout") -> nbformat.NotebookNode:
    return new_output("stream", name=name, text=text)


def execute(script: Path, *outputs: nbformat.NotebookNode) -> Path:
    """The notebook as papermill leaves it after running with STEPS = 3, without the wait for a kernel."""
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    notebook.cells.insert(2, new_code_cell("STEPS = 3", metadata={"tags": ["injected-parameters"]}))
    notebook.metadata |= {"papermill": {"parameters": {"STEPS": 3}}, "widgets": {"state": {}}, "language_info": {}}
    for count, cell in enumerate(notebook.cells[1:], start=1):
        cell.execution_count = count
        cell.metadata["papermill"] = {"status": "completed"}
    notebook.cells[3].outputs = list(outputs) or [new_output("display_data", WIDGET), stream("3\n")]
    nbformat.write(notebook, script.parent / "executed.ipynb")
    return script.parent / "executed.ipynb"


def test_outputs_are_taken_over(script: Path):
    export.take_outputs(execute(script), script)
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert [cell.source for cell in notebook.cells] == ["# Title", "STEPS = 100", "print(STEPS)"]
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 3]
    assert notebook.cells[1].outputs == []
    assert notebook.cells[2].outputs == [{"output_type": "stream", "name": "stdout", "text": "3\n"}]


def test_runs_of_the_same_code_give_the_same_table(script: Path):
    def show(table: str, address: str) -> nbformat.NotebookNode:
        html = f'<style>#T_{table}_row0 {{}}</style><table id="T_{table}"><td>T_shirts, T_12345a</td></table>'
        return new_output("display_data", {"text/html": html, "text/plain": f"<Styler at 0x{address}>"})

    export.take_outputs(execute(script, show("0fa31", "7efd40c0")), script)
    first = script.with_suffix(".ipynb").read_text()
    assert "<td>T_shirts, T_12345a</td>" in first
    export.take_outputs(execute(script, show("9bc77", "7f130596")), script)
    assert script.with_suffix(".ipynb").read_text() == first


def test_nothing_of_papermill_is_taken_over(script: Path):
    export.take_outputs(execute(script), script)
    text = script.with_suffix(".ipynb").read_text()
    assert "papermill" not in text
    assert "injected-parameters" not in text


def test_metadata_of_an_earlier_run_are_dropped(script: Path):
    path = script.with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata |= {"widgets": {"state": {}}, "colab": {"provenance": []}}
    notebook.cells[1].metadata["execution"] = {"iopub.execute_input": "2026-01-01"}
    nbformat.write(notebook, path)
    export.take_outputs(execute(script), script)
    taken = nbformat.read(path, as_version=4)
    assert set(taken.metadata) == {"jupytext", "executed_code_digest"}
    assert [cell.metadata for cell in taken.cells] == [{}, {"tags": ["parameters"]}, {}]


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
    with pytest.raises(SystemExit, match=r"executed\.ipynb is not a finished run of papermill: run it again"):
        export.take_outputs(executed, script)


def test_large_outputs_are_refused(script: Path):
    with pytest.raises(SystemExit, match=r"more than 3,000,000: print or draw less"):
        export.take_outputs(execute(script, stream("x" * 3_000_000)), script)


@pytest.mark.parametrize(
    "text",
    ["/x/story.py:1: UserWarning: too old\n  print(STEPS)\n", "1\nWarning: no token is set\n", "\rFutureWarning: x"],
)
def test_warning_is_refused_with_its_cell(script: Path, text: str):
    before = script.with_suffix(".ipynb").read_text()
    message = r"cell \[3\] of .*executed\.ipynb \(`print\(STEPS\)`\) shows: .*Warning: .*\nMend the cause, or filter"
    with pytest.raises(SystemExit, match=message):
        export.take_outputs(execute(script, stream("3\n"), stream(text, "stderr")), script)
    assert script.with_suffix(".ipynb").read_text() == before


def test_error_is_refused_with_its_cell(script: Path):
    error = new_output("error", ename="ValueError", evalue="no steps", traceback=[])
    with pytest.raises(SystemExit, match=r"cell \[3\] of .* shows: ValueError: no steps"):
        export.take_outputs(execute(script, error), script)


def test_script_is_found_by_the_name_of_the_run():
    scripts = [Path("story.py"), Path("notebooks/04_areas.py")]
    assert export.find_script(Path("outputs/topics/04_areas.ipynb"), scripts) == Path("notebooks/04_areas.py")
    with pytest.raises(SystemExit, match=r"other\.ipynb belongs to no script: there is no other\.py"):
        export.find_script(Path("outputs/other.ipynb"), scripts)


def test_topic_is_refreshed_by_its_own_command(package: Path, script: Path):
    assert export.refresh_command(script) == "make notebook"
    assert export.refresh_command(write_topic(package, "")) == "make topic NAME=04_areas"


# What a run leaves on the screen

FIGURE = new_output("display_data", {"text/plain": "a figure"})


def lasting(*outputs: nbformat.NotebookNode) -> list[str]:
    """The texts of the streams that are kept, and `figure` for each figure."""
    kept = export.lasting_outputs(new_code_cell(outputs=list(outputs)))
    assert {output.name for output in kept if output.output_type == "stream"} <= {"stdout"}
    return [output.get("text", "figure") for output in kept]


class KernelStream(list):
    """What is written, as a kernel sends it to a notebook."""

    def write(self, text: str) -> None:
        self.append(stream(text, "stderr"))

    def flush(self) -> None:
        pass


def bar_of(stderr: KernelStream, name: str, leave: bool = True) -> tqdm:
    shape = "{desc}: {percentage:3.0f}%|{bar:2}| {n_fmt}/{total_fmt} [1 s]"
    return tqdm(range(2), desc=name, leave=leave, file=stderr, mininterval=0, ascii=True, bar_format=shape)


def test_bar_is_left_in_its_final_state():
    stderr = KernelStream()
    for _ in bar_of(stderr, "checking"):
        pass
    assert len(stderr) > 3
    assert lasting(*stderr) == ["checking: 100%|##| 2/2 [1 s]\n"]


@pytest.mark.parametrize("leave", [True, False])
def test_bar_inside_of_another_leaves_nothing(leave: bool):
    stderr = KernelStream()
    for _ in range(2):
        stderr.append(stream("a run\n"))
        for _ in bar_of(stderr, "training"):
            for _ in bar_of(stderr, "evaluating", leave):
                pass
    assert any("\x1b[A" in output.text for output in stderr)
    assert lasting(*stderr) == ["a run\ntraining: 100%|##| 2/2 [1 s]\n" * 2]


def test_bars_one_after_the_other_are_left():
    stderr = KernelStream()
    for _ in range(3):
        for _ in bar_of(stderr, "evaluating"):
            pass
    assert lasting(*stderr) == ["evaluating: 100%|##| 2/2 [1 s]\n" * 3]


def test_bar_that_wipes_itself_leaves_nothing():
    stderr = KernelStream()
    for _ in bar_of(stderr, "checking", leave=False):
        pass
    assert lasting(*stderr) == []


def test_bar_stays_where_it_began():
    stderr = KernelStream()
    for number in bar_of(stderr, "training"):
        stderr.extend([stream(f"step {number}\n"), FIGURE])
    assert lasting(*stderr) == ["training: 100%|##| 2/2 [1 s]\nstep 0\n", "figure", "step 1\n", "figure"]


def test_message_printed_into_a_bar_has_a_line_of_its_own():
    stderr = KernelStream()
    for number in bar_of(stderr, "training"):
        if number == 0:
            stderr.write("loading\n")
    assert lasting(*stderr) == ["loading\ntraining: 100%|##| 2/2 [1 s]\n"]


@pytest.mark.parametrize(
    ("written", "left"),
    [
        (["one\n", "two\n"], "one\ntwo\n"),
        (["one", " line"], "one line\n"),
        (["one\n\ntwo\n\n"], "one\n\ntwo\n\n"),
        (["ten\rone\n"], "one\n"),
        (["one\r\ntwo\r\n"], "one\ntwo\n"),
        (["one\ntwo\x1b[A\rten\n"], "ten\ntwo\n"),
        (["one\ntwo\x1b[A\n", "ten\n"], "one\nten\n"),
        (["one  \n"], "one\n"),
        (["\x1b[1;31mred\x1b[0m \x08\x07text\n"], "red text\n"),
        (["a\ttab\n"], "a\ttab\n"),
    ],
)
def test_lines_without_control_characters(written: list[str], left: str):
    assert lasting(*map(stream, written)) == [left]


def test_stdout_and_stderr_become_one_stream():
    assert lasting(stream("one\n"), stream("two\n", "stderr"), stream("three\n")) == ["one\ntwo\nthree\n"]
