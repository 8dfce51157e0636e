"""What names packages agrees: pyproject.toml, both requirements.txt, environment.yml and the notebook's Colab cell.

.venv/bin/python -m pytest tests/test_environment.py
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import peft
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from helpers.export import ROOT, SCRIPT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
USED = PYPROJECT["project"]["dependencies"]
DEVELOPMENT = PYPROJECT["dependency-groups"]["dev"]
FILES = [ROOT / "requirements.txt", ROOT / "tests/requirements.txt"]

each_file = pytest.mark.parametrize("path", FILES, ids=["users", "development"])


def versions(name: str, path: Path) -> list[str]:
    """Every version at which a file pins a package: several where Python versions differ."""
    lines = path.read_text().splitlines()
    return [match[1] for line in lines if (match := re.match(rf"{re.escape(name)}==([^\s;]+)", line))]


def names(path: Path) -> set[str]:
    """The packages that a file pins."""
    return set(re.findall(r"^([a-z0-9._-]+)==", path.read_text(), flags=re.MULTILINE))


def colab_packages(code: str) -> list[str]:
    """What a script installs on Colab: its list `packages`, at any depth, and what is added to it."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assign | ast.AugAssign)]
    targets = [ast.unparse(node.target if isinstance(node, ast.AugAssign) else node.targets[0]) for node in nodes]
    lists = [node.value for node, target in zip(nodes, targets, strict=True) if target == "packages"]
    assert lists, "no list `packages`"
    return [package for packages in lists for package in ast.literal_eval(packages)]


def test_conda_installs_the_same_pins():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert dependencies == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}]
    assert SpecifierSet(PYPROJECT["project"]["requires-python"]).contains("3.11")


@pytest.mark.parametrize(
    ("dependency", "path"),
    [(dependency, FILES[0]) for dependency in USED] + [(dependency, FILES[1]) for dependency in DEVELOPMENT],
    ids=[*USED, *DEVELOPMENT],
)
def test_dependency_is_pinned_inside_its_range(dependency: str, path: Path):
    requirement = Requirement(dependency)
    pinned = versions(requirement.name, path)
    assert pinned, f"{requirement.name} is not pinned: run `make requirements`"
    outside = [version for version in pinned if not requirement.specifier.contains(version)]
    assert not outside, f"{requirement.name} is pinned at {outside}, outside {dependency}: run `make requirements`"


def test_users_do_not_get_development_tools():
    tools = {Requirement(dependency).name for dependency in DEVELOPMENT}
    assert tools >= {"pytest", "ruff"}
    assert tools & names(FILES[0]) == set()


def test_development_keeps_the_users_versions():
    shared = names(FILES[0]) & names(FILES[1])
    assert len(shared) > 10
    differing = {name for name in shared if not set(versions(name, FILES[1])) <= set(versions(name, FILES[0]))}
    assert not differing, f"pinned otherwise for development: {differing}: run `make requirements`"


@each_file
def test_requirements_are_pins_and_nothing_else(path: Path):
    pin = re.compile(r"[a-z0-9._-]+==[\w.+!]+( ; .+)?")
    lines = path.read_text().splitlines()
    assert [line for line in lines if not line.lstrip().startswith("#") and not pin.fullmatch(line)] == []


@each_file
def test_requirements_name_no_host(path: Path):
    lines = path.read_text().splitlines()
    assert [line for line in lines if re.search(r"://|\w\.(org|com|net|io|dev)\b", line)] == []


def test_colab_installs_what_the_project_names():
    packages = colab_packages(SCRIPT.read_text())
    assert packages
    assert [package for package in packages if package not in USED] == []


def test_colab_packages_are_found_at_any_depth():
    code = 'import sys\n\nif "google.colab" in sys.modules:\n    packages = ["trl>=1"]\n    packages += ["peft"]\n'
    assert colab_packages(code) == ["trl>=1", "peft"]
    with pytest.raises(AssertionError, match="no list `packages`"):
        colab_packages('others = ["trl>=1"]\n')


# Colab

PREINSTALLED = ROOT / "tests/colab_preinstalled.txt"


def read_pins(path: Path) -> dict[str, str]:
    """Package -> version of a file of pins."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", path.read_text(), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def colab_uninstalls(code: str) -> set[str]:
    """What a script takes off Colab."""
    return set(re.findall(r'"pip", "uninstall", "-q", "-y", "([\w-]+)"', code))


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> dict[str, str]:
    """What is installed on Colab after the notebook's first cell; what was there is kept where it suffices."""
    folder = tmp_path_factory.mktemp("colab")
    (folder / "packages.in").write_text("\n".join([*colab_packages(SCRIPT.read_text()), "torch", "torchvision"]))
    shutil.copy(PREINSTALLED, folder / "resolved.txt")  # pins in the output file are kept if they can be
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", "-q", "packages.in", "-o", "resolved.txt"]
    subprocess.run([*command, "--python-version", "3.13", "--python-platform", "linux"], check=True, cwd=folder)
    left = read_pins(PREINSTALLED) | read_pins(folder / "resolved.txt")
    return {name: version for name, version in left.items() if name not in colab_uninstalls(SCRIPT.read_text())}


def test_colab_has_what_the_notebook_names(colab):
    named = {Requirement(package).name for package in colab_packages(SCRIPT.read_text())} | {"torch", "torchvision"}
    wanted = [requirement for requirement in map(Requirement, USED) if requirement.name in named]
    assert len(wanted) == 7
    assert [str(r) for r in wanted if not r.specifier.contains(colab[r.name])] == []


def test_colab_keeps_its_torch(colab):
    before = read_pins(PREINSTALLED)
    assert {name: colab[name] for name in ("torch", "torchvision")} == {"torch": "2.11.0", "torchvision": "0.26.0"}
    assert colab["numpy"] == before["numpy"]  # imported by Colab before the first cell runs


def test_what_is_left_on_colab_does_not_stop_peft(colab, monkeypatch):
    peft.import_utils.is_torchao_available.cache_clear()
    monkeypatch.setattr(peft.import_utils.importlib.util, "find_spec", lambda name: True if name in colab else None)
    monkeypatch.setattr(peft.import_utils.importlib_metadata, "version", lambda name: colab[name])
    peft.import_utils.is_torchao_available()  # raises where it is too old
    monkeypatch.setitem(colab, "torchao", read_pins(PREINSTALLED)["torchao"])
    peft.import_utils.is_torchao_available.cache_clear()
    with pytest.raises(ImportError, match="incompatible version of torchao"):
        peft.import_utils.is_torchao_available()
    peft.import_utils.is_torchao_available.cache_clear()
