"""What names packages agrees: pyproject.toml, requirements.txt, environment.yml and the notebook's Colab cell.

.venv/bin/python -m pytest tests/test_environment.py
"""

import ast
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers.export import ROOT, SCRIPT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
PINS = (ROOT / "requirements.txt").read_text().splitlines()


def versions(name: str) -> list[str]:
    """Every version at which requirements.txt pins a package: several where Python versions differ."""
    return [match[1] for line in PINS if (match := re.match(rf"{re.escape(name)}==([^\s;]+)", line))]


def colab_packages() -> list[str]:
    """What the notebook installs on Colab."""
    for node in ast.parse(SCRIPT.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COLAB_PACKAGES":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{SCRIPT.name} has no COLAB_PACKAGES")


def test_conda_installs_the_same_pins():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert dependencies == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}]
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11")


@pytest.mark.parametrize("dependency", DIRECT)
def test_dependency_is_pinned_inside_its_range(dependency: str):
    requirement = Requirement(dependency)
    pinned = versions(requirement.name)
    assert pinned, f"{requirement.name} is not pinned: run `make requirements`"
    outside = [version for version in pinned if not requirement.specifier.contains(version)]
    assert not outside, f"{requirement.name} is pinned at {outside}, outside {dependency}: run `make requirements`"


def test_requirements_are_pins_and_nothing_else():
    pin = re.compile(r"[a-z0-9._-]+==[\w.+!]+( ; .+)?")
    assert [line for line in PINS if not line.lstrip().startswith("#") and not pin.fullmatch(line)] == []


def test_requirements_name_no_host():
    assert [line for line in PINS if re.search(r"://|\w\.(org|com|net|io|dev)\b", line)] == []


def test_colab_installs_what_the_project_names():
    assert colab_packages()
    assert [package for package in colab_packages() if package not in PROJECT["dependencies"]] == []
