"""What must hold after every drill: the run is started again, and nobody can tell that anything had happened."""

from __future__ import annotations

from typing import Any, NamedTuple

from pretrain import checkpoint
from tests.drills.lab import MAX_STEPS, RANKS, SAVE_EVERY, Run

DONE, REFUSED = [0] * RANKS, {2}


class Outcome(NamedTuple):
    last: int  # step in metrics.jsonl when the run was dead
    resumed_from: int
    redone: int  # steps; the most of all lives
    lost: int  # committed steps beyond the one resumed from, but for those that the drill has damaged


def check(run: Run) -> Outcome:
    """Start the run again, unless the drill has brought it to its end, and compare. Raises AssertionError."""
    if DONE not in [life.statuses for life in run.lives]:
        assert run.start().wait() == DONE, f"could not be started again: {run.lives[-1].statuses}"
    # A life that was refused or killed before it had restored anything tells nothing.
    lives = [
        (life, left)
        for life, left in zip(run.lives, run.left, strict=True)
        if life.statuses == DONE or (life.resumed_from and set(life.statuses) != REFUSED)
    ]
    redone = []
    for life, left in lives:
        assert life.resumed_from == left.newest, f"went on from step {life.resumed_from}, {left.newest} is whole"
        redone.append(left.last - life.resumed_from)
        # While a save is under way the run trains up to the next one, and waits there.
        limit = SAVE_EVERY * (1 + left.under_way + len(run.damaged))
        assert redone[-1] <= limit, f"{redone[-1]} steps redone, {left}"
    life, left = lives[-1]
    if run.expected is not None:
        assert life.resumed_from == run.expected, f"went on from step {life.resumed_from}, not {run.expected}"
    earlier = run.lives[: run.lives.index(life)]
    committed = {step for other in earlier for step in other.saved} | set(left.whole)
    lost = max(committed - run.damaged, default=0) - life.resumed_from
    assert lost <= 0, f"{lost} committed steps lost"
    compare(run, run.lab.uninterrupted)
    return Outcome(left.last, life.resumed_from, max(redone), max(lost, 0))


def compare(run: Run, uninterrupted: Run) -> None:
    """Losses, norms, validation, weights and moments bit for bit; and nothing is left lying about."""
    ours, theirs = trained(run), trained(uninterrupted)
    assert [record["step"] for record in ours] == list(range(1, MAX_STEPS + 1)), "a step is missing or stands twice"
    for one, other in zip(ours, theirs, strict=True):
        assert one == other, f"step {one['step']} differs: {one} is not {other}"
    assert run.files_of_last_step() == uninterrupted.files_of_last_step(), "weights or moments differ"
    assert run.committed() == uninterrupted.committed(), f"steps {run.committed()} are kept"
    assert (run.path / "checkpoints/LATEST").read_text().strip() == checkpoint.step_path(run.path, MAX_STEPS).name
    assert run.exit()["status"] == 0, f"exit.json: {run.exit()}"
    left_over = [path.name for path in run.path.glob("checkpoints/*") if ".tmp-" in path.name]
    assert not left_over, f"left over: {left_over}"
    assert not (run.path / "lease.json").exists(), "the lease was not given back"


def trained(run: Run) -> list[dict[str, Any]]:
    """What metrics.jsonl says about learning, without times and memory."""
    names = ("step", "loss", "masked_accuracy", "grad_norm", "learning_rate")
    return [
        {key: value for key, value in record.items() if key in names or key.startswith("validation")}
        for record in run.metrics()
    ]
