"""What is installed where: the container, the Makefile and docs/install.md follow pyproject.toml and each other."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTAINER = ROOT / "slurm/container"
DEFINITION, DOCKERFILE = (CONTAINER / "dnabert2.def").read_text(), (CONTAINER / "Dockerfile").read_text()


def steps(text: str) -> list[str]:
    return " ".join(re.findall(r"bash \S*install\.sh (.+)", text)).split()


def test_both_container_files_begin_with_the_same_image_and_take_the_same_steps():
    images = [re.findall(r"^FROM:? +(\S+)$", text, re.M | re.I) for text in (DEFINITION, DOCKERFILE)]
    assert images[0] == images[1] and len(images[0]) == 1
    assert steps(DEFINITION) == steps(DOCKERFILE) == ["system", "torch", "deepspeed", "apex", "project", "check"]


def test_both_container_files_copy_every_package():
    packages = {path.parent.name for path in ROOT.glob("*/__main__.py")}
    needed = packages | {"constraints.txt", "pyproject.toml", "LICENSE"}
    assert needed == set(re.findall(r"^ +(\S+) /opt/dnabert2-source/$", DEFINITION, re.M))
    copied = " ".join(re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M)).split()
    assert needed == set(copied) - {"slurm/container/install.sh"}  # which comes earlier, for the cache


def test_an_unknown_step_of_the_recipe_is_refused():
    done = subprocess.run(["bash", CONTAINER / "install.sh", "systen"], capture_output=True, text=True)
    assert done.returncode == 2 and "no step 'systen'" in done.stderr


def test_the_documentation_names_what_pyproject_requires():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = dict(re.findall(r"^\| (Required|`\w+`): (.+?) \|", (ROOT / "docs/install.md").read_text(), re.M))
    groups = {f"`{name}`": found for name, found in project["optional-dependencies"].items()}
    for name, requirements in {"Required": project["dependencies"], **groups}.items():
        bare = [re.match(r"[\w-]+", requirement)[0] for requirement in requirements if "dnabert2" not in requirement]
        missing = [package for package in bare if package.lower() not in rows[name].lower()]
        assert not missing, f"docs/install.md, row {name}"


def test_the_documentation_has_the_command_that_make_wheelhouse_prints():
    done = subprocess.run(["make", "--dry-run", "wheelhouse"], cwd=ROOT, capture_output=True, text=True, check=True)
    (command,) = re.findall(r'echo "(python3 -m venv .*)"', done.stdout)
    assert f"\n{command}\n" in (ROOT / "docs/install.md").read_text()
