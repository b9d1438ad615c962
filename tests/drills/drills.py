"""The drills: each breaks a run in its own way. `check.py` says what must hold afterwards."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from random import Random

import psutil

from data_prep.cli import BAD_INPUT, FAILED, HUNG, RUN_AGAIN
from pretrain import checkpoint
from tests.drills.lab import MAX_STEPS, RANKS, SAVE_EVERY, Life, Run
from tests.drills.worker import fill

Drill = Callable[[Run, Random], None]
KILLED = -signal.SIGKILL
PHASES = ("copy", "write", "meet", "manifest", "rename", "latest", "retain")
ANY_RANK = ("copy", "write", "meet")  # the other phases are rank 0's
COMMITTED = ("latest", "retain")  # phases in which the step has its name
CHECKPOINT_BYTES = 5_000_000
HOUR = 3600.0


def train_some_steps(run: Run, rng: Random, life: Life, most: int = MAX_STEPS - 6) -> None:
    step = rng.randint(1, most)
    life.until(lambda: run.last_step() >= step, f"step {step}")


def kill_all_ranks_at_random(run: Run, rng: Random) -> None:
    """One life, or two in a row; the instants are even over the time that the run takes, its start included."""
    kills = rng.randint(1, 2)
    while len(run.lives) < kills:
        life, seconds = run.start(), rng.uniform(0, run.lab.seconds)
        time.sleep(seconds)
        life.signal(signal.SIGKILL)
        run.note += f"{'and ' if run.note else ''}all at {seconds:.2f} s "
        if 0 in life.wait():
            run.start_over()  # it was faster than the uninterrupted one


def kill_one_rank_at_random(run: Run, rng: Random) -> None:
    """torchrun ends the other rank, which may be waiting for the killed one to join."""
    rank = rng.randrange(RANKS)
    while not run.lives:
        life, seconds = run.start(torchrun=True), rng.uniform(0, run.lab.seconds)
        victim = life.until(partial(life.rank_under_torchrun, rank), f"rank {rank}")
        time.sleep(seconds)
        run.note = f"rank {rank} at {seconds:.2f} s"
        with suppress(psutil.NoSuchProcess):
            victim.kill()
        if 0 in life.wait():
            run.start_over()


def kill_in_update(run: Run, rng: Random) -> None:
    rank, step = rng.randrange(RANKS), rng.randint(1, MAX_STEPS)
    run.note = f"rank {rank} in step {step}"
    run.expected = (step - 1) // SAVE_EVERY * SAVE_EVERY
    killed(run.start(fault={"point": "update", "rank": rank, "step": step}), rank)


def kill_in_save(run: Run, rng: Random, phase: str) -> None:
    rank = rng.randrange(RANKS) if phase in ANY_RANK else 0
    everyone = rng.random() < 0.5
    step = SAVE_EVERY * rng.randint(3, MAX_STEPS // SAVE_EVERY)  # from the third on there is one to delete
    run.note = f"{'all' if everyone else f'rank {rank}'} in save {step}"
    run.expected = step if phase in COMMITTED else step - SAVE_EVERY
    life = run.start(fault={"point": phase, "rank": rank, "step": step, "all": everyone})
    killed(life, *(range(RANKS) if everyone else [rank]))


def killed(life: Life, *ranks: int) -> None:
    """These ranks are killed and the others find out by themselves."""
    expected = [KILLED if rank in ranks else HUNG for rank in range(RANKS)]
    assert life.wait() == expected, f"ended with {life.statuses}, not {expected}"


def disk_full_before_save(run: Run, rng: Random) -> None:
    """Another program fills the disk: the next save is refused, then a start, then there is room."""
    balloon = run.move_to_small_disk(megabytes=128) / "balloon"
    life = run.start()
    train_some_steps(run, rng, life)
    # Enough for what is under way, too little for the next one.
    fill(balloon, rng.randint(3 * CHECKPOINT_BYTES, 10 * CHECKPOINT_BYTES))
    run.note = f"from step {run.last_step()} on"
    refused(run, life)
    before = run.committed()
    refused(run, run.start())
    assert run.committed() == before
    balloon.unlink()


def refused(run: Run, life: Life) -> None:
    assert life.wait() == [BAD_INPUT] * RANKS, f"ended with {life.statuses}"
    reason = run.exit()["reason"]
    assert "a checkpoint needs" in reason and "make room" in reason, reason


def disk_full_in_save(run: Run, rng: Random) -> None:
    balloon = run.move_to_small_disk(megabytes=128) / "balloon"
    rank, step = rng.randrange(RANKS), SAVE_EVERY * rng.randint(1, MAX_STEPS // SAVE_EVERY)
    remaining = rng.randint(100_000, CHECKPOINT_BYTES)  # what the save uses of it is there again for exit.json
    run.note = f"by rank {rank} in save {step}, but for {remaining / 1e6:.1f} MB"
    fault = {"point": "fill", "rank": rank, "step": step, "balloon": str(balloon), "bytes": remaining}
    life = run.start(fault=fault)
    assert life.wait() == [FAILED] * RANKS, f"ended with {life.statuses}"
    left = run.exit()
    assert left["status"] == FAILED and "No space left" in left["reason"], f"exit.json: {left}"
    run.expected = step - SAVE_EVERY
    balloon.unlink()


def damage(run: Run, rng: Random, how: str) -> None:
    """The run is killed, then a file of its newest checkpoint is damaged: the one before is used."""
    life = run.start()
    life.until(lambda: len(run.committed()) >= 2, "two checkpoints")
    time.sleep(rng.uniform(0, 1))
    life.signal(signal.SIGKILL)
    assert life.wait() == [KILLED] * RANKS
    *_, before, newest = run.committed()
    file = rng.choice(sorted(checkpoint.step_path(run.path, newest).iterdir()))
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    if how == "truncated":
        del data[place:]
    else:
        data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    run.note = f"{file.name} of step {newest} at byte {place}"
    run.damaged, run.expected = {newest}, before
    again = run.start()
    assert again.wait() == [0] * RANKS, f"could not be started again: {again.statuses}"
    assert list(run.path.glob(f"checkpoints/{checkpoint.step_path(run.path, newest).name}.damaged-*")), "not set aside"


def hung_rank(run: Run, rng: Random) -> None:
    rank = rng.randrange(RANKS)
    life = run.start("watchdog.step_seconds=8", "watchdog.save_seconds=8", "data.stall_seconds=4")
    train_some_steps(run, rng, life)
    life.signal(signal.SIGSTOP, rank)
    run.note = f"rank {rank} stopped after step {run.last_step()}"
    other = 1 - rank
    life.until(lambda: life.statuses[other] is not None, "end of the other rank")
    assert life.statuses[other] == HUNG, f"ended with {life.statuses}"
    left = run.exit()
    assert left["status"] == HUNG and f"rank {rank}" in left["reason"], f"exit.json: {left}"
    (stacks,) = run.path.glob(f"hangs/*-rank-{other:05d}.txt")
    assert "train.py" in stacks.read_text(), f"{stacks.name} has no stack of the training thread"
    life.signal(signal.SIGKILL, rank)
    life.wait()


def stop(run: Run, rng: Random, number: signal.Signals) -> None:
    """The step is finished and saved, all ranks leave with 75, and no step is redone."""
    life = run.start()
    train_some_steps(run, rng, life)
    ranks = rng.choice([[], [0], [1]])
    life.signal(number, *ranks)
    run.note = f"to {f'rank {ranks[0]}' if ranks else 'all'} after step {run.last_step()}"
    assert life.wait() == [RUN_AGAIN] * RANKS, f"ended with {life.statuses}"
    left = run.exit()
    assert left["status"] == RUN_AGAIN and left["checkpoint_step"] == run.last_step(), f"exit.json: {left}"
    run.expected = run.last_step()


def second_run_refused(run: Run, rng: Random) -> None:
    """The first one stands still meanwhile, so that it can't be done before the second has asked."""
    life = run.start()
    train_some_steps(run, rng, life)
    life.signal(signal.SIGSTOP)
    run.note = f"at step {run.last_step()}"
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    second = run.start()
    assert second.wait() == [BAD_INPUT] * RANKS, f"the second ended with {second.statuses}"
    assert f"pid {life.processes[0].pid} is running here" in second.text, "the holder is not named"
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}, "the second has changed something"
    life.signal(signal.SIGCONT)
    assert life.wait() == [0] * RANKS, f"the first ended with {life.statuses}"


def two_runs_at_once(run: Run, rng: Random) -> None:
    lives = [run.start(), run.start()]
    statuses = sorted(life.wait() for life in lives)
    run.note = f"the {'first' if lives[0].statuses[0] == 0 else 'second'} one won"
    assert statuses == [[0] * RANKS, [BAD_INPUT] * RANKS], f"ended with {statuses}"


def dead_lease(run: Run, rng: Random, owner: str) -> None:
    """A killed life leaves its lease; what it says about its owner is changed."""
    life = run.start()
    train_some_steps(run, rng, life)
    life.signal(signal.SIGKILL)
    life.wait()
    path = run.path / "lease.json"
    lease = json.loads(path.read_text())
    changed = {"host": "elsewhere", "boot_id": "another"} if owner == "elsewhere" else {"pid": os.getpid()}
    text = json.dumps(lease | changed, indent=2) + "\n"
    path.write_text(text[: rng.randrange(len(text))] if owner == "unreadable" else text)
    run.note = f"killed after step {run.last_step()}"
    again = run.start()
    assert again.wait() == [0] * RANKS, f"could not be started again: {again.statuses}"
    assert "lease.json: taken over from" in again.text


def clock_backwards(run: Run, rng: Random) -> None:
    """Some hours in the middle of one life, which is then killed; more of them for the next one."""
    step, hours = rng.randint(1, 12), rng.randint(1, 12)
    life = run.start(fault={"point": "clock", "step": step, "seconds": -hours * HOUR})
    train_some_steps(run, rng, life)
    life.signal(signal.SIGKILL)
    life.wait()
    later = hours + rng.randint(1, 48)
    run.note = f"{hours} h in step {step}, {later} h after step {run.last_step()}"
    again = run.start(fault={"point": "clock", "step": 0, "seconds": -later * HOUR})
    assert again.wait() == [0] * RANKS, f"could not be started again: {again.statuses}"
    hour_ago = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - HOUR))
    assert run.exit()["time"] < hour_ago, "its clock was not set back"


DRILLS: dict[str, Drill] = {
    "kill_all_ranks_at_random": kill_all_ranks_at_random,
    "kill_one_rank_at_random": kill_one_rank_at_random,
    "kill_in_update": kill_in_update,
    **{f"kill_in_save[{phase}]": partial(kill_in_save, phase=phase) for phase in PHASES},
    "disk_full_before_save": disk_full_before_save,
    "disk_full_in_save": disk_full_in_save,
    "truncated_file": partial(damage, how="truncated"),
    "flipped_bit": partial(damage, how="flipped"),
    "hung_rank": hung_rank,
    "sigterm": partial(stop, number=signal.SIGTERM),
    "sigusr1": partial(stop, number=signal.SIGUSR1),
    "second_run_refused": second_run_refused,
    "two_runs_at_once": two_runs_at_once,
    **{f"dead_lease[{owner}]": partial(dead_lease, owner=owner) for owner in ("elsewhere", "pid reused", "unreadable")},
    "clock_backwards": clock_backwards,
}
