"""Print what follows from the main script: the modules of this package, and the outputs in its notebook.

    python -m helpers.export                                   # helpers/<module>.py (a part of `make sync`)
    python -m helpers.export outputs/demo/<executed>.ipynb     # the outputs of this run (a part of `make notebook`)

A code cell of the script that opens with `#| export <module>` is printed into `helpers/<module>.py`, with the imports
that it needs: the script's own and those of sibling modules. Such a cell may only define functions, classes and
names, and may read nothing but imports and other exported names, so that exported code has no hidden inputs. A module
with a function `main` is printed as a command: it ends by calling it.
"""

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "fine_tuning_vlm_for_object_detection_trl.py"
PACKAGE = ROOT / "helpers"

MARK = re.compile(r"#\| export ([a-z][a-z0-9_]*)\n")
HEADER = '"""Printed from {script}: edit the script, then run `make sync`."""'
RUN_AS_SCRIPT = 'if __name__ == "__main__":\n    main()\n'  # ends a module that defines `main`
PRINTED = HEADER.partition("{")[0]  # how the first line of every printed module begins
LARGEST_NOTEBOOK = 3_000_000  # bytes; code hosts stop showing notebooks that are much larger
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar that only lives beside its kernel


# The modules


def export_cells(script: Path) -> dict[str, list[str]]:
    """The code of the script's export cells, without their marks, by the module that they go to."""
    modules = {}
    for source in code_sources(jupytext.read(script)):
        if mark := MARK.match(source):
            modules.setdefault(mark[1], []).append(source[mark.end() :])
        elif re.search(r"^#\s*\|", source, flags=re.MULTILINE):
            sys.exit(f"{script.name}: a cell must open with `#| export <module>`, this one does not:\n{source}")
    return modules


def top_level_imports(script: Path) -> list[str]:
    """The script's import statements; those inside of `if` blocks or functions stay where they are."""
    body = ast.parse(script.read_text()).body
    return [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]


def defined_names(module: str, source: str) -> list[str]:
    """The names that one export cell defines; a cell that does anything else is refused."""
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


def names_by_module(modules: dict[str, list[str]]) -> dict[str, list[str]]:
    """The names that each module defines; a name belongs to one module only."""
    owners = {}
    for module, cells in modules.items():
        for name in (name for cell in cells for name in defined_names(module, cell)):
            if name in owners:
                sys.exit(f"`{name}` is exported twice, to `{owners[name]}` and to `{module}`: rename one")
            owners[name] = module
    return {module: [name for name in owners if owners[name] == module] for module in modules}


def ruff(text: str, module: str, *arguments: str) -> str:
    """What ruff prints about `text`, taken as a module of this package."""
    place = ["--config", str(ROOT / "pyproject.toml"), "--stdin-filename", str(PACKAGE / f"{module}.py"), "-"]
    command = [sys.executable, "-m", "ruff", *arguments, *place]
    result = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=False)
    if result.returncode > 1:  # 1 means findings, more means that ruff itself failed
        sys.exit(result.stderr)
    return result.stdout


def refuse_undefined_names(text: str, module: str) -> None:
    """Stop where exported code reads a variable of the notebook."""
    findings = json.loads(ruff(text, module, "check", "--select", "F821", "--output-format", "json"))
    if findings:
        names = ", ".join(sorted({re.search("`(.+)`", finding["message"])[1] for finding in findings}))
        sys.exit(
            f"helpers/{module}.py: undefined (F821): {names}. Exported code sees imports and exported names only: "
            "pass it as an argument, or export its definition too"
        )


def printed_modules(script: Path) -> dict[str, str]:
    """The text of every helper module, by its name."""
    modules, imports = export_cells(script), top_level_imports(script)
    names = names_by_module(modules)
    pages = {}
    for module, cells in modules.items():
        siblings = [f"from helpers.{other} import {', '.join(names[other])}" for other in modules if other != module]
        ending = [RUN_AS_SCRIPT] if "main" in names[module] else []
        text = "\n\n".join([HEADER.format(script=script.name), "\n".join(imports + siblings), *cells, *ending])
        text = ruff(text, module, "check", "--fix-only", "--quiet", "--select", "F,I")  # drops the unused imports
        refuse_undefined_names(text, module)
        pages[module] = ruff(text, module, "format", "--quiet")
    return pages


def is_printed(path: Path) -> bool:
    """Whether a module of the package was printed, not written by hand."""
    return path.read_text().startswith(PRINTED)


def write_modules(script: Path, package: Path) -> None:
    """Print the modules into `package`; those whose cells are gone are deleted."""
    pages = {package / f"{module}.py": text for module, text in printed_modules(script).items()}
    for path in pages:
        if path.exists() and not is_printed(path):
            sys.exit(f"{path} is written by hand: choose another name in `#| export {path.stem}`")
    for path in set(filter(is_printed, package.glob("*.py"))) - set(pages):
        path.unlink()
        print(f"deleted {path.name}: no cell exports to it")
    for path, text in pages.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"printed {path.name}")


# The notebook's outputs


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


def refuse_unfinished(executed: NotebookNode, path: Path) -> None:
    """Stop where papermill did not bring every cell to its end."""
    if any(cell.metadata.get("papermill", {}).get("status") != "completed" for cell in code_cells(executed)):
        sys.exit(f"{path} is not a finished run of papermill: run `make notebook`")


def refuse_other_code(executed: NotebookNode, committed: NotebookNode, script: Path) -> None:
    """Stop where the run, the notebook and the script do not hold the same code."""
    wanted = code_sources(jupytext.read(script))
    if code_sources(committed) != wanted:
        sys.exit(f"{script.name} and its notebook differ: run `make sync`, then `make notebook`")
    if code_sources(executed) != wanted:
        sys.exit(f"the executed notebook holds other code than {script.name}: run `make notebook`")


def lasting_outputs(cell: NotebookNode) -> list[NotebookNode]:
    """A cell's outputs without widgets, which are dead without their kernel, and with each progress bar at its end."""
    kept = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    merged, _ = CoalesceStreamsPreprocessor().preprocess_cell(NotebookNode(outputs=kept), {}, 0)
    return merged.outputs


def take_outputs(path: Path, script: Path) -> None:
    """Copy the outputs of an executed notebook into the script's own notebook."""
    target = script.with_suffix(".ipynb")
    executed, committed = (nbformat.read(notebook, as_version=4) for notebook in (path, target))
    refuse_unfinished(executed, path)
    refuse_other_code(executed, committed, script)
    for cell, ran in zip(code_cells(committed), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = lasting_outputs(ran), ran.execution_count
    committed.metadata["executed_code_digest"] = code_digest(committed)
    text = jupytext.writes(committed, fmt="ipynb") + "\n"  # as `make sync` would write it
    if (size := len(text.encode())) > LARGEST_NOTEBOOK:
        sys.exit(f"{target.name} would take {size:,} bytes, more than {LARGEST_NOTEBOOK:,}: print or draw less")
    target.write_text(text)
    print(f"{target.name} has the outputs of {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executed", nargs="?", type=Path, help="a notebook that papermill executed: take its outputs")
    arguments = parser.parse_args()
    if arguments.executed:
        take_outputs(arguments.executed, SCRIPT)
    else:
        write_modules(SCRIPT, PACKAGE)


if __name__ == "__main__":
    main()
