"""What a model consists of: its modules, parameters and their names.

Printed from notebooks/02_model_understanding.py: edit that, then run `make sync`.
"""

import math
import re
from collections import Counter

import pandas as pd
import torch


def describe_tree(module: torch.nn.Module, depth: int, name: str = "model") -> list[str]:
    """A line a module down to `depth`, with class and parameters; of a list of equal layers only the first."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    lines = [f"{name} ({type(module).__name__}): {parameters:,}"]
    children = list(module.named_children()) if depth else []
    if isinstance(module, torch.nn.ModuleList):
        lines[0] = f"{name}: {len(module)} layers, {parameters:,} in all; each:"
        children = children[:1]
    for child_name, child in children:
        if any(True for _ in child.parameters()):
            lines += [f"    {line}" for line in describe_tree(child, depth - 1, child_name)]
    return lines


def without_layer_number(name: str) -> str:
    """A module's or parameter's path with `{i}` in place of the number of its block or layer."""
    return re.sub(r"\.(blocks|layers)\.\d+(?=\.|$)", r".\1.{i}", name)


def list_parameters(model: torch.nn.Module) -> pd.DataFrame:
    """All parameters: path with `{i}` for layer numbers, shape, how many of them, how many numbers, their share."""
    found = Counter(
        (without_layer_number(name), tuple(parameter.shape)) for name, parameter in model.named_parameters()
    )
    lines = [(path, shape, count, count * math.prod(shape)) for (path, shape), count in found.items()]
    table = pd.DataFrame(lines, columns=["path", "shape", "count", "parameters"]).set_index("path")
    return table.assign(share=table.parameters / table.parameters.sum())


def list_linear_modules(model: torch.nn.Module, prefix: str = "") -> pd.DataFrame:
    """The linear layers below `prefix`: path with `{i}` for layer numbers, their shape, how many of them."""
    found = Counter(
        (without_layer_number(name), module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefix)
    )
    lines = [(*key, count) for key, count in found.items()]
    return pd.DataFrame(lines, columns=["module", "in", "out", "count"]).set_index("module")


def find_modules_by_pattern(model: torch.nn.Module, pattern: str) -> list[str]:
    """Paths of the modules that a regular expression matches in full, as PEFT matches `target_modules`."""
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
