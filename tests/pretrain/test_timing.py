import time

import pytest
import torch

from pretrain.timing import StepTimer, slowest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def timer(request: pytest.FixtureRequest) -> StepTimer:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return StepTimer(torch.device(request.param))


def test_what_happens_between_steps_belongs_to_none(timer: StepTimer) -> None:
    started = time.perf_counter()
    for _ in range(3):
        timer.start_step()
        timer.end_step()
        time.sleep(0.02)  # validation
    outside = time.perf_counter() - started
    found = timer.summary()
    assert 0 <= found["step_seconds_p50"] <= found["step_seconds_p90"] <= found["step_seconds_max"] < outside - 0.05
    assert found["busy_seconds"] == 0


def test_only_forward_passes_keep_a_rank_busy(timer: StepTimer) -> None:
    timer.start_step()
    for _ in range(2):
        with timer.compute():
            time.sleep(0.01)
        time.sleep(0.03)  # backward, waiting for the others
    timer.end_step()
    found = timer.summary()
    assert found["step_seconds_p50"] == found["step_seconds_max"] >= 0.075
    assert 0.015 <= found["busy_seconds"] <= found["step_seconds_max"] - 0.055


def test_a_summary_begins_a_new_interval(timer: StepTimer) -> None:
    for seconds in (0.05, 0.0):
        timer.start_step()
        with timer.compute():
            time.sleep(seconds)
        timer.end_step()
        found = timer.summary()
        assert found["step_seconds_p50"] == found["step_seconds_max"]  # of one step
        assert seconds <= found["busy_seconds"] <= found["step_seconds_max"]
    assert found["busy_seconds"] < 0.05


def test_the_slowest_rank_is_named_with_its_ratio_to_the_median() -> None:
    assert slowest([1.0, 1.1, 2.2, 0.9, 1.1]) == (2, pytest.approx(2.0))
    assert slowest([3.0, 1.0]) == (0, 3.0)  # not to the mean of both, which it raises itself
    assert slowest([2.0]) == (0, 1.0)
    assert slowest([0.0, 0.0]) == (0, 1.0)  # nothing was measured
