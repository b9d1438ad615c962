"""Six of the drills, the sharpest ones; `make drills` runs them all."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from tests.drills.check import check
from tests.drills.drills import DRILLS
from tests.drills.lab import Lab, Unavailable

# With seeds that are quick: where one of two ranks is killed in a save, the other gives that save half a minute.
SEEDS = {
    "kill_all_ranks_at_random": 7,
    "kill_in_save[write]": 7,
    "kill_in_save[rename]": 4,
    "disk_full_in_save": 7,
    "hung_rank": 7,
    "clock_backwards": 1,
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Lab:
    return Lab(tmp_path_factory.mktemp("drills"), tiny_dataset)


@pytest.mark.drill
@pytest.mark.parametrize(("name", "seed"), SEEDS.items(), ids=list(SEEDS))
def test_a_run_survives(lab: Lab, name: str, seed: int) -> None:
    with lab.run() as run:
        try:
            DRILLS[name](run, Random(f"{name} {seed}"))
            check(run)
        except Unavailable as error:
            if os.environ.get("REQUIRE_DRILLS") == "1":
                pytest.fail(f"REQUIRE_DRILLS=1, but {error}")
            pytest.skip(str(error))
        except AssertionError:
            print(run.note, run.log())
            raise
