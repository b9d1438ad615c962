"""Presets: the YAML files of `pretrain/configs`, and files that say only what they change in one of them.

    preset: dnabert2_117m
    optimizer:
      weight_decay: 0.02

Sections are merged key by key; what is merged is what a run writes to its config.yaml, without the key `preset`. One level
only: a preset that is changed stands for itself, so two files tell all. `pretrain/config.py` says which keys there are.
Needs no torch, so that a login node can read configurations too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from data_prep.cli import InputError

PRESETS = Path(__file__).parent / "configs"
BASE = "preset"  # top-level key: the preset that a file changes


def read_config(path: str) -> tuple[Path, dict[str, Any]]:
    """The YAML file `path`, or that of the preset of this name, and what it says merged into the preset that it changes.

    Raises InputError when there is no such file or preset, or when a file is not YAML.
    """
    file = Path(path) if Path(path).is_file() else PRESETS / f"{path}.yaml"
    if not file.is_file():
        raise InputError(f"{path}: no such file, and not one of the presets {_known()}")
    tree = read_yaml(file)
    base = tree.pop(BASE, None)
    if base is None:
        return file, tree
    if not isinstance(base, str) or not (PRESETS / f"{base}.yaml").is_file():
        raise InputError(f"{file}: {BASE}: {base!r} is not one of the presets {_known()}")
    below = read_yaml(PRESETS / f"{base}.yaml")
    if BASE in below:
        raise InputError(
            f"{file}: {BASE}: {base} changes a preset itself; name {below[BASE]}, and repeat what {base} changes"
        )
    return file, _merged(below, tree)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; InputError names the file."""
    try:
        tree = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file}: expected a mapping of sections such as `train:`")
    return tree


def _known() -> str:
    return ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below`, with the values of `above` where that has any."""
    merged = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merged(below[key], above[key])
    return merged
