"""A small model, a run directory that holds it, and its export; not to be changed by a test."""

import pytest

from pretrain.hf import export_run
from tests.pretrain.directories import build_model, make_run


@pytest.fixture(scope="session")
def model():
    return build_model()


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("run")
    make_run(path, model)
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory, run_dir):
    out = tmp_path_factory.mktemp("exported") / "model"
    export_run(run_dir, out)
    return out
