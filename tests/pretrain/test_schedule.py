import itertools
import math

import pytest

from data_prep.cli import InputError
from pretrain.config import OptimizerConfig, TrainConfig, load_config
from pretrain.schedule import batch_size, learning_rate


def rates(schedule: str, **others: float) -> list[float]:
    config = OptimizerConfig(schedule=schedule, learning_rate=2.0, warmup_steps=4, **others)
    return [learning_rate(config, step, 20) for step in range(20)]


def test_linear_is_the_papers() -> None:
    assert rates("linear") == [0.5, 1.0, 1.5, 2.0] + [2.0 * (20 - step) / 16 for step in range(4, 20)]


def test_cosine_ends_at_its_share_of_the_peak() -> None:
    found = rates("cosine", final_learning_rate_ratio=0.1)
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert found[12] == pytest.approx(0.2 + 1.8 / 2) and found[8] == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2)
    assert found[4:] == sorted(found[4:], reverse=True) and 0.2 < found[-1] < 0.22


def test_wsd_is_stable_and_then_decays_by_a_root() -> None:
    found = rates("wsd", decay_steps=4, final_learning_rate_ratio=0.5)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0] and found[4:17] == [2.0] * 13
    assert found[17:] == pytest.approx([1 + 1 - math.sqrt(done / 4) for done in (1, 2, 3)])


def test_batches_grow_by_whole_sequences_and_then_stay() -> None:
    train = TrainConfig(global_batch_size=11, batch_warmup={"start": 2, "steps": 4})
    assert [batch_size(train, step) for step in range(7)] == [2, 4, 6, 8, 11, 11, 11]
    assert [batch_size(TrainConfig(global_batch_size=11), step) for step in range(3)] == [11] * 3
    paper = TrainConfig(batch_warmup={"start": 256, "steps": 10_000})
    sizes = [batch_size(paper, step) for step in range(10_001)]
    assert sizes == sorted(sizes) and max(b - a for a, b in itertools.pairwise(sizes)) == 1 and sizes[-1] == 4096


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.schedule=wsd", "optimizer.warmup_steps=9", "optimizer.decay_steps=592"], "is over train.max_steps"),
        (["optimizer.final_learning_rate_ratio=0.1"], "linear goes to 0"),
        (["optimizer.name=lamb", "optimizer.implementation=apex"], "says who computes AdamW"),
        (["train.batch_warmup.start=33", "train.batch_warmup.steps=5"], "start is over train.global_batch_size"),
        (["train.batch_warmup.start=3"], "train.batch_warmup.steps is missing"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_config("tiny", overrides)
