"""Print what follows from the scripts: the modules of this package, and the outputs in the notebooks.

    python -m helpers.export                                     # helpers/<module>.py (a part of `make sync`)
    python -m helpers.export outputs/topics/04_analysis.ipynb    # outputs of executed notebooks (of `make notebook`)
    python -m helpers.export --keep notebook    # stop where a notebook has an edit that its script lacks; or: script
    python -m helpers.export --synced           # note that scripts and notebooks say the same; `make` does both

The scripts are the story at the top of the repository and the topics in notebooks/. A code cell that opens with
`#| export <module>` is printed into `helpers/<module>.py`; the first such cell of a module also says what the module
is for: `#| export boxes: Pixels to a model's coordinates and back.` A module gets the imports that it needs: those of
its script, and those of the modules that its script exports beside it. What a topic takes from elsewhere it imports at
its top (`from helpers.boxes import to_grid`); the story imports no helpers.

An export cell may only define functions, classes and names, and may read nothing but imports and other exported
names, so that exported code has no hidden inputs. A module with a function `main` is printed as a command: it ends by
calling it.
"""

import argparse
import ast
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_output

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "fine_tuning_vlm_for_object_detection_trl.py"
SCRIPTS = [SCRIPT, *sorted((ROOT / "notebooks").glob("*.py"))]  # the story, then the topics
PACKAGE = ROOT / "helpers"

MARK = re.compile(r"#\| export ([a-z][a-z0-9_]*)(?:: (.+\.))?\n")
HEADER = '"""{purpose}\n\nPrinted from {script}: edit that, then run `make sync`.\n"""'
PRINTED = re.compile(r'"""(.*\n\n)?Printed from ')  # how printed modules begin
RUN_AS_SCRIPT = 'if __name__ == "__main__":\n    main()\n'  # ends a module that defines `main`

LARGEST_NOTEBOOK = 3_000_000  # bytes; code hosts stop showing notebooks that are much larger
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar that only lives beside its kernel
LASTING_METADATA = (
    "jupytext",
    "kernelspec",
    "lines_to_next_cell",
    "tags",
    "synced_digest",
)  # the rest: times, widgets, the machine

CURSOR_UP = "\x1b[A"
PIECES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x00-\x08\n-\x1f\x7f]+")  # other control characters are left out
BAR = re.compile(r"(.*?)\d{1,3}%\|.*\| \S+/\S+ \[")  # tqdm: description, percentage, bar, count/total [time]


# The modules


@dataclass(frozen=True)
class Module:
    """A module as its script defines it."""

    name: str
    script: Path
    purpose: str  # one sentence
    cells: list[str]  # code, without marks


def export_cells(script: Path) -> list[tuple[str, str | None, str]]:
    """Module, sentence (None without one) and code of each export cell. Exits where a mark is misspelt."""
    cells = []
    for source in code_sources(jupytext.read(script)):
        if mark := MARK.match(source):
            cells.append((mark[1], mark[2], source[mark.end() :]))
        elif re.search(r"^#\s*\|", source, flags=re.MULTILINE):
            sys.exit(
                f"{script.name}: a cell must open with `#| export <module>` or `#| export <module>: A sentence.`, "
                f"this one does not:\n{source}"
            )
    return cells


def read_modules(script: Path) -> list[Module]:
    """The modules that a script exports to. Exits unless the first cell of each, and no other, says what it is for."""
    cells = export_cells(script)
    modules = []
    for name in dict.fromkeys(name for name, _, _ in cells):
        purpose, *others = [sentence for module, sentence, _ in cells if module == name]
        if not purpose or any(others):
            sys.exit(
                f"{script.name}: the first cell of `{name}`, and no other, says what the module is for: "
                f"`#| export {name}: What it is for.`"
            )
        modules.append(Module(name, script, purpose, [code for module, _, code in cells if module == name]))
    return modules


def read_all_modules(scripts: Sequence[Path]) -> list[Module]:
    """The modules of all scripts. Exits where two scripts export to the same one."""
    modules = [module for script in scripts for module in read_modules(script)]
    for one, other in itertools.combinations(modules, 2):
        if one.name == other.name:
            scripts_of_both = f"{one.script.name} and {other.script.name}"
            sys.exit(f"`{one.name}` has two sources, {scripts_of_both}: export to it from one of them only")
    return modules


def defined_names(module: str, source: str) -> list[str]:
    """The names that one export cell defines. Exits where the cell does anything else."""
    names = []
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.append(name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.append(name)
            case _:
                sys.exit(f"an export cell of `{module}` may only define; move elsewhere: {ast.unparse(node)}")
    return names


def find_owners(modules: Sequence[Module]) -> dict[str, Module]:
    """The module of each exported name. Exits where a name is exported twice."""
    owners = {}
    for module in modules:
        for name in (name for cell in module.cells for name in defined_names(module.name, cell)):
            if name in owners:
                sys.exit(f"`{name}` is exported twice, to `{owners[name].name}` and to `{module.name}`: rename one")
            owners[name] = module
    return owners


def import_nodes(script: Path) -> list[ast.Import | ast.ImportFrom]:
    """A script's import statements; those inside of `if` blocks or functions are not meant."""
    return [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]


def top_level_imports(script: Path) -> list[str]:
    """The text of a script's import statements."""
    return [ast.unparse(node) for node in import_nodes(script)]


def imports_of_printed(script: Path, modules: Sequence[Module]) -> list[tuple[Module, str]]:
    """Module and name of all that a script imports by `from helpers.<module> import <name>` from printed modules."""
    by_path = {f"helpers.{module.name}": module for module in modules}
    nodes = [node for node in import_nodes(script) if isinstance(node, ast.ImportFrom) and node.module in by_path]
    return [(by_path[node.module], alias.name) for node in nodes for alias in node.names]


def refuse_wrong_imports(script: Path, modules: Sequence[Module], owners: dict[str, Module]) -> None:
    """Stop where a script imports a name from a module that it is not exported to, or from one of its own modules."""
    for module, name in imports_of_printed(script, modules):
        if module.script == script:
            sys.exit(f"{script.name} exports to `{module.name}` and imports `{name}` from it: drop the import")
        if owners.get(name) != module:
            elsewhere = f", but to `{owners[name].name}`" if name in owners else ""
            sys.exit(f"{script.name} imports `{name}` from `{module.name}`; it is not exported to that{elsewhere}")


def ruff(text: str, module: str, *arguments: str) -> str:
    """What ruff prints about `text`, taken as a module of this package."""
    place = ["--config", str(ROOT / "pyproject.toml"), "--stdin-filename", str(PACKAGE / f"{module}.py"), "-"]
    command = [sys.executable, "-m", "ruff", *arguments, *place]
    result = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=False)
    if result.returncode > 1 or "No module named ruff" in result.stderr:  # 1 alone means findings
        sys.exit(f"{result.stderr}The tools for changing the project: pip install -r tests/requirements.txt")
    return result.stdout


def refuse_undefined_names(text: str, module: str, owners: dict[str, Module]) -> None:
    """Stop where exported code reads a variable of its notebook, or what only another script defines."""
    findings = json.loads(ruff(text, module, "check", "--select", "F821", "--output-format", "json"))
    names = sorted({re.search("`(.+)`", finding["message"])[1] for finding in findings})
    for name in names:
        if name in owners:
            sys.exit(
                f"helpers/{module}.py: `{name}` is exported by {owners[name].script.name}. A topic imports it at its "
                f"top: `from helpers.{owners[name].name} import {name}`. The story stands alone: define it there"
            )
    if names:
        sys.exit(
            f"helpers/{module}.py: undefined (F821): {', '.join(names)}. Exported code sees imports and exported "
            "names only: pass it as an argument, or export its definition too"
        )


def print_module(module: Module, owners: dict[str, Module], root: Path) -> str:
    """The text of one helper module; its source is named by the path from `root`."""
    header = HEADER.format(purpose=module.purpose, script=module.script.relative_to(root).as_posix())
    beside = {name: owner.name for name, owner in owners.items() if owner.script == module.script and owner != module}
    siblings = [f"from helpers.{owner} import {name}" for name, owner in beside.items()]
    ending = [RUN_AS_SCRIPT] if owners.get("main") == module else []
    text = "\n\n".join([header, "\n".join(top_level_imports(module.script) + siblings), *module.cells, *ending])
    text = ruff(text, module.name, "check", "--fix-only", "--quiet", "--select", "F,I")  # drops the unused imports
    refuse_undefined_names(text, module.name, owners)
    return ruff(text, module.name, "format", "--quiet")


def printed_modules(scripts: Sequence[Path]) -> dict[str, str]:
    """The text of every helper module, by its name. `scripts`: the story, then the topics."""
    modules = read_all_modules(scripts)
    owners = find_owners(modules)
    for script in scripts:
        refuse_wrong_imports(script, modules, owners)
    return {module.name: print_module(module, owners, root=scripts[0].parent) for module in modules}


def is_printed(path: Path) -> bool:
    """Whether a module of the package was printed, not written by hand. It need not be valid Python."""
    return PRINTED.match(path.read_text()) is not None


def find_orphans(package: Path, pages: Collection[Path]) -> list[Path]:
    """The printed modules in `package` that are not among `pages`."""
    return [path for path in sorted(package.glob("*.py")) if is_printed(path) and path not in pages]


def write_modules(scripts: Sequence[Path], package: Path) -> None:
    """Print the modules of all scripts into `package`; those whose cells are gone are deleted."""
    pages = {package / f"{module}.py": text for module, text in printed_modules(scripts).items()}
    for path in pages:
        if path.exists() and not is_printed(path):
            sys.exit(f"{path} is written by hand: choose another name in `#| export {path.stem}`")
    for path in find_orphans(package, pages):
        path.unlink()
        print(f"deleted {path.name}: no cell exports to it")
    for path, text in pages.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"printed {path.name}")


# The code of a notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook, without the parameters that papermill injected."""
    injected = "injected-parameters"
    return [c for c in notebook.cells if c.cell_type == "code" and injected not in c.metadata.get("tags", [])]


def code_sources(notebook: NotebookNode) -> list[str]:
    """The code of a notebook, cell by cell."""
    return [cell.source for cell in code_cells(notebook)]


def code_digest(notebook: NotebookNode) -> str:
    """A fingerprint of a notebook's code: it tells whether outputs belong to it."""
    return hashlib.sha256(json.dumps(code_sources(notebook)).encode()).hexdigest()


# What a run leaves on the screen


def bar_name(text: str) -> str | None:
    """The description of a progress bar; None where a line shows no bar."""
    match = BAR.match(text)
    return match and match[1].strip()


@dataclass
class Line:
    """A line on a screen, and the number of the output that began it."""

    text: str = ""
    began: int | None = None


class Screen:
    """The lines that a stream leaves on a terminal.

    Unlike there, text after a carriage return replaces the whole line, and a bar that ran inside of another one leaves
    nothing behind.
    """

    def __init__(self) -> None:
        self.lines = [Line()]
        self.row = 0  # of the cursor
        self.replacing = False  # the next text replaces the line
        self.closing = False  # the next newline is the end of an inner bar

    def write(self, number: int, text: str) -> None:
        """Show the text of output `number`."""
        for piece in PIECES.findall(text):
            if piece == "\n":
                self.end_line(number)
            elif piece == "\r":
                self.replacing = True
            elif piece == CURSOR_UP:
                self.row = max(0, self.row - 1)
            elif not piece.startswith("\x1b"):  # colours and the like are left out
                self.put(number, piece)

    def put(self, number: int, text: str) -> None:
        """Write text without control characters into the line of the cursor."""
        if self.replacing and self.is_below(bar_name(text)):
            # tqdm closes an inner bar by writing it over the outer one, which it then draws in a new line
            del self.lines[self.row + 1 :]
            self.closing = True
            return
        line = self.begin_line(number)
        is_bar = bar_name(line.text) is not None  # text that was printed into a bar takes its line, too
        line.text = text if self.replacing or is_bar else line.text + text
        self.replacing = False

    def is_below(self, name: str | None) -> bool:
        """Whether a bar of this name stands below the cursor."""
        return name is not None and name in [bar_name(line.text) for line in self.lines[self.row + 1 :]]

    def begin_line(self, number: int) -> Line:
        """The line of the cursor, begun by output `number` if it is empty."""
        line = self.lines[self.row]
        line.began = line.began if line.text.strip() else number
        return line

    def end_line(self, number: int) -> None:
        """Move the cursor to the next line."""
        if self.closing:
            self.closing = False
            return
        self.begin_line(number)
        self.row += 1
        self.replacing = True
        if self.row == len(self.lines):
            self.lines.append(Line())

    def shown(self) -> list[tuple[int, str]]:
        """Number and text of each line; those that were wiped with spaces are gone."""
        begun = [line for line in self.lines if line.began is not None and not line.text.isspace()]
        return [(line.began, line.text.rstrip()) for line in begun]


# The outputs of a run


def refresh_command(script: Path) -> str:
    """What runs a script's notebook anew and keeps its outputs."""
    return f"make topic NAME={script.stem}" if script.parent.name == "notebooks" else "make notebook"


def refuse_unfinished(executed: NotebookNode, path: Path) -> None:
    """Stop where papermill did not bring every cell to its end."""
    if any(cell.metadata.get("papermill", {}).get("status") != "completed" for cell in code_cells(executed)):
        sys.exit(f"{path} is not a finished run of papermill: run it again")


def refuse_other_code(executed: NotebookNode, committed: NotebookNode, script: Path) -> None:
    """Stop where the run, the notebook and the script do not hold the same code."""
    wanted = code_sources(jupytext.read(script))
    if code_sources(committed) != wanted:
        sys.exit(f"{script.name} and its notebook differ: run `make sync`, then `{refresh_command(script)}`")
    if code_sources(executed) != wanted:
        sys.exit(f"the executed notebook holds other code than {script.name}: run `{refresh_command(script)}`")


def find_problem(cell: NotebookNode) -> str | None:
    """The first error or warning among a cell's outputs; None without one."""
    printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    errors = [f"{output.ename}: {output.evalue}" for output in cell.outputs if output.output_type == "error"]
    warnings = [line for line in printed.splitlines() if "Warning:" in line]  # `story.py:1: UserWarning: …`
    return next(iter(errors + warnings), None)


def refuse_problems(executed: NotebookNode, path: Path) -> None:
    """Stop where a cell shows an error or a warning, which a reader should not have to wonder about."""
    for cell in code_cells(executed):
        if problem := find_problem(cell):
            name = f"cell [{cell.execution_count}] of {path} (`{cell.source.splitlines()[0]}`)"
            sys.exit(f"{name} shows: {problem}\nMend the cause, or filter the warning and say why")


def join_lines(items: Sequence[str | NotebookNode]) -> list[NotebookNode]:
    """Lines and other outputs in their order, neighbouring lines as one stream."""
    outputs = []
    for are_lines, group in itertools.groupby(items, key=lambda item: isinstance(item, str)):
        if are_lines:
            outputs.append(new_output("stream", name="stdout", text="".join(f"{line}\n" for line in group)))
        else:
            outputs.extend(group)
    return outputs


def lasting_outputs(cell: NotebookNode) -> list[NotebookNode]:
    """A cell's outputs: what its streams leave on a screen, and no widgets, which are dead without their kernel."""
    screens = {"stdout": Screen(), "stderr": Screen()}
    numbered = []
    for number, output in enumerate(cell.outputs):
        if output.output_type == "stream":
            screens[output.name].write(number, output.text)
        elif WIDGET not in output.get("data", {}):
            numbered.append((number, output))
    numbered += screens["stdout"].shown() + screens["stderr"].shown()
    return join_lines([item for _, item in sorted(numbered, key=lambda pair: pair[0])])


def fix_names(outputs: Sequence[NotebookNode], number: int) -> None:
    """Replace the ids that pandas draws by lot, and addresses: runs of the same code differ in their times only."""
    for data in (output.data for output in outputs if "data" in output):
        if "text/html" in data:
            data["text/html"] = re.sub(r"\bT_[0-9a-f]{5}(?=[_\W])", f"T_{number:05}", data["text/html"])
        if "text/plain" in data:
            data["text/plain"] = re.sub(r" at 0x[0-9a-f]+>$", ">", data["text/plain"])


def drop_metadata(notebook: NotebookNode) -> None:
    """Leave of the metadata of a notebook and its cells only what outlasts a run."""
    for node in [notebook, *notebook.cells]:
        for key in set(node.metadata) - set(LASTING_METADATA):
            del node.metadata[key]


def take_outputs(path: Path, script: Path) -> None:
    """Copy the outputs of an executed notebook into the script's own notebook."""
    target = script.with_suffix(".ipynb")
    executed, committed = (nbformat.read(notebook, as_version=4) for notebook in (path, target))
    refuse_unfinished(executed, path)
    refuse_other_code(executed, committed, script)
    refuse_problems(executed, path)
    for cell, ran in zip(code_cells(committed), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = lasting_outputs(ran), ran.execution_count
        fix_names(cell.outputs, ran.execution_count)
    drop_metadata(committed)
    committed.metadata["executed_code_digest"] = code_digest(committed)
    text = jupytext.writes(committed, fmt="ipynb") + "\n"  # as `make sync` would write it
    if (size := len(text.encode())) > LARGEST_NOTEBOOK:
        sys.exit(f"{target.name} would take {size:,} bytes, more than {LARGEST_NOTEBOOK:,}: print or draw less")
    target.write_text(text)
    print(f"{target.name} has the outputs of {path}")


# Edits


def cells_digest(notebook: NotebookNode) -> str:
    """What tells whether a notebook or a script was edited: a hash of its cells."""
    return hashlib.sha256(json.dumps([[cell.cell_type, cell.source] for cell in notebook.cells]).encode()).hexdigest()


def refuse_lost_edit(script: Path, side: str) -> None:
    """Exit, naming the cell, where `side` ("script" or "notebook") was edited since both said the same."""
    notebook, printed = nbformat.read(script.with_suffix(".ipynb"), as_version=4), jupytext.read(script)
    digests = {"script": cells_digest(printed), "notebook": cells_digest(notebook)}
    if notebook.metadata.get("synced_digest") in (None, digests[side]) or digests["script"] == digests["notebook"]:
        return
    pairs = itertools.zip_longest(printed.cells, notebook.cells)
    number, cells = next(
        (n, pair) for n, pair in enumerate(pairs, 1) if len({c and (c.cell_type, c.source) for c in pair}) > 1
    )
    line = (cells[side == "notebook"] or cells[side == "script"]).source.partition("\n")[0]
    file = script.with_suffix({"script": ".py", "notebook": ".ipynb"}[side])
    command = "make from-notebook" if side == "notebook" else "make sync"
    sys.exit(f"{file.name} has an edit that would be lost, in cell {number} (`{line}`): run `{command}`, or undo it")


def note_synced(script: Path) -> None:
    """Remember in the notebook what both say now."""
    file = script.with_suffix(".ipynb")
    notebook = nbformat.read(file, as_version=4)
    notebook.metadata["synced_digest"] = cells_digest(notebook)
    file.write_text(jupytext.writes(notebook, fmt="ipynb") + "\n")


def find_script(executed: Path, scripts: Sequence[Path]) -> Path:
    """The script that an executed notebook is called after."""
    by_stem = {script.stem: script for script in scripts}
    if executed.stem not in by_stem:
        sys.exit(f"{executed} belongs to no script: there is no {executed.stem}.py")
    return by_stem[executed.stem]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executed", nargs="*", type=Path, help="notebooks that papermill executed: take their outputs")
    parser.add_argument("--keep", choices=["script", "notebook"], help="stop where this side has an edit of its own")
    parser.add_argument("--synced", action="store_true", help="note that both sides say the same")
    arguments = parser.parse_args()
    for executed in arguments.executed:
        take_outputs(executed, find_script(executed, SCRIPTS))
    for script in SCRIPTS if arguments.keep else []:
        refuse_lost_edit(script, arguments.keep)
    for script in SCRIPTS if arguments.synced else []:
        note_synced(script)
    if not (arguments.executed or arguments.keep or arguments.synced):
        write_modules(SCRIPTS, PACKAGE)


if __name__ == "__main__":
    main()
