"""What names packages agrees: pyproject.toml, both requirements.txt, environment.yml and the notebook's Colab cell.

.venv/bin/python -m pytest tests/test_environment.py
"""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

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
    """What a script installs on Colab: its list `packages`, at any depth."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "packages":
            return ast.literal_eval(node.value)
    raise AssertionError("no list `packages`")


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
    assert colab_packages('import sys\n\nif "google.colab" in sys.modules:\n    packages = ["trl>=1"]\n') == ["trl>=1"]
    with pytest.raises(AssertionError, match="no list `packages`"):
        colab_packages('others = ["trl>=1"]\n')
