"""The main job: train, validate, save, and go on after anything.

A run is its directory. Running the same command again resumes from the newest checkpoint that verifies, on however many
ranks there are now; a finished run is left as it is. See `docs/design.md` for what stays identical.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.cli import Hung, InputError, StopRequested, dump_json, log, one_line
from data_prep.dataset import Dataset
from pretrain import checkpoint, run_directory, zero_state
from pretrain.bad_steps import BadSteps, BadStepsFile, described
from pretrain.compiled import prepare_engine
from pretrain.config import Config
from pretrain.distributed import RankLost, StopSignal, World, environment_rank, start
from pretrain.interval import Interval
from pretrain.lease import Lease
from pretrain.lives import record_life
from pretrain.loader import Loader, MaskedBatch, open_dataset
from pretrain.metrics import Metrics
from pretrain.optimizer import name_of
from pretrain.prefetch import Prefetch
from pretrain.profiling import Profile
from pretrain.resume import NONE, WENT_BACK_TO, find_checkpoint, went_back_to
from pretrain.saver import Saver
from pretrain.schedule import batch_size
from pretrain.training_step import Taken, TrainingSteps
from pretrain.validation import Validation
from pretrain.watchdog import Watchdog

LOST_SECONDS = 10.0  # for a save under way to end when a rank is gone; torchrun kills 30 s after it has noticed
COLLECTIVE_MARGIN_SECONDS = 120.0  # by which the watchdog comes before the time-out of collectives


def train(config: Config, from_step: int | None = None, profile_steps: int = 0) -> dict[str, Any]:
    """Run until `train.max_steps` or `train.stop_at_step`; returns the step, the last loss and the number of ranks.

    Rank 0, or another where it is gone, writes RUN_DIR/exit.json where it can, unless another life holds the directory.
    Raises StopRequested after SIGTERM or SIGUSR1, with the step saved, InputError for what can't be trained on, Hung when
    another rank is lost, and RuntimeError when too many steps in a row are bad.

    Args:
        from_step: go back to this checkpoint; the steps after it are set aside.
        profile_steps: steps of this life that torch's profiler records, after some to warm up.
    """
    stop, run_dir, life = StopSignal(), Path(config.run_dir), ""
    world, lease, run, refused, failure = None, None, None, None, None
    try:
        if environment_rank() == 0:
            life = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
            try:
                lease = Lease.take(run_dir, life)
                (run_dir / "exit.json").unlink(missing_ok=True)
            except Exception as error:
                refused = error  # the others hear of it when they have come together
                if not isinstance(error, InputError):  # no other life is here, but the disk fails
                    with suppress(OSError):
                        (run_dir / "exit.json").unlink(missing_ok=True)
        # What is wrong with the input is found by every rank alone, before it waits for the others.
        config, dataset = open_dataset(config)
        if from_step is not None and went_back_to(run_dir) == from_step:
            # A job that is queued again with the same command must not go back a second time.
            log(f"the run has gone back to step {from_step} already; move later steps out of checkpoints/ to do it again")
            from_step = None
        run_directory.check(config, run_dir, dataset, from_step)
        world = start(config.watchdog.start_seconds)
        if world.is_first:
            world.store.set("life", life)
        life = world.store.get("life").decode()
        run = _Run(config, run_dir, world, life, stop, lease)
        world.agree(refused)
        run.begin(dataset, from_step)
        return run.run(profile_steps)
    except BaseException as error:
        failure = error if world is None or isinstance(error, StopRequested) else world.explain(error)
        if failure is error:
            raise
        raise failure from error
    finally:
        try:
            if run is not None:
                run.let_save_end(failure)
            if lease is not None:
                lease.check()
                if failure is not None:  # half of a save must not fill the disk on which exit.json has to stand
                    checkpoint.remove_leftovers(run_dir)
                run_directory.write_exit(run_dir, failure)
            elif world is not None and isinstance(failure, Hung):
                run_directory.write_exit_instead(run_dir, life, world.rank, failure)
        except (OSError, RuntimeError) as error:  # a full disk, a lost lease: no reason to hide why the run ended
            log(f"exit.json is not written: {one_line(error)}")
        finally:
            if lease is not None:
                lease.release()
            if world is not None and (failure is None or isinstance(failure, StopRequested)):
                dist.destroy_process_group()
            if run is not None:
                run.watchdog.close()


class _Run:
    """One life of a run, on one rank: `begin`, `run`, and in any case `let_save_end` and `watchdog.close`."""

    def __init__(
        self, config: Config, run_dir: Path, world: World, life: str, stop: StopSignal, lease: Lease | None
    ) -> None:
        self.config, self.run_dir, self.world, self.life, self.stop = config, run_dir, world, life, stop
        self.watchdog = Watchdog(run_dir, world.rank, world.size, life, world.store, world.reported_failure)
        self.watchdog.enter("starting", config.watchdog.start_seconds)
        self.saver = Saver(run_dir, config.checkpoint, world, life, lease)

    def begin(self, dataset: Dataset, from_step: int | None) -> None:
        """Build everything and go to where the run goes on; a collective.

        Nothing of the run is changed before nothing can refuse it any more.
        """
        config, run_dir, world = self.config, self.run_dir, self.world
        self.loader = Loader(config, dataset, world.rank, world.size, pin=world.device.type == "cuda")
        found = find_checkpoint(run_dir, world, from_step)
        self.engine, self.kernels = prepare_engine(config, world, dataset.manifest["sequence_length"])
        world.limit_collectives(config.watchdog.start_seconds + COLLECTIVE_MARGIN_SECONDS)  # of DeepSpeed's groups too
        self.shapes = zero_state.shapes(self.engine)
        self.step, self.saved_step = 0, None if found is None else found.step
        self.position = 0  # in the order of training, where the next global batch begins
        self.optimizer_step = 0  # of the optimizer: bad steps don't count
        # What passes on from checkpoint to checkpoint: an imported model's source, a step that the run went back to.
        self.origin: dict[str, Any] = {} if from_step is None else {WENT_BACK_TO: from_step}
        self.bad_steps = BadSteps(config.bad_steps, world.device)
        self.bad_in_a_row = 0  # as of the steps that have been read
        if found is None:
            seed, std = config.train.seed, config.model.initializer_range
            zero_state.load(self.engine, zero_state.InitialState(self.shapes, seed, std))
        else:
            self._restore(found)
        stop_at = config.train.stop_at_step
        self.last = config.train.max_steps if stop_at is None else min(stop_at, config.train.max_steps)
        self.metrics: Metrics | None = None
        self.bad_steps_file: BadStepsFile | None = None
        failure: Exception | None = None
        if world.is_first:
            try:
                self._prepare_directory(dataset, going_back=from_step is not None)
            except Exception as error:
                failure = error
        world.agree(failure)
        self.loss: float | None = None
        self.validation = Validation(config, world, self.loader, self.engine, self.watchdog)
        self.interval = Interval(config, world)
        self.steps = TrainingSteps(config, world, self.engine, self.bad_steps, self.interval.timer)

    def _prepare_directory(self, dataset: Dataset, going_back: bool) -> None:
        """Rank 0's part: make room, see whether there is enough, and write what a life writes when it begins."""
        checkpoint.remove_leftovers(self.run_dir)
        newest = NONE if self.saved_step is None else self.saved_step
        if not going_back:
            checkpoint.set_aside(self.run_dir, newest, "damaged", self.life)
            checkpoint.retain(self.run_dir, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every)
        if self.step < self.last:
            self.saver.check_space(self._numel())
        if going_back:
            checkpoint.set_aside(self.run_dir, newest, "left", self.life)
        run_directory.describe(self.config, self.run_dir, dataset)
        self.metrics = Metrics(self.run_dir, self.step, self.config.train.max_steps)
        self.bad_steps_file = BadStepsFile(self.run_dir, self.step)
        if self.step < self.last:
            record_life(self.run_dir, self.life, self.world.size, self.step)

    def let_save_end(self, failure: BaseException | None) -> None:
        """A rank that was lost won't let it end: it is not waited for long."""
        limit = LOST_SECONDS if isinstance(failure, RankLost) else self.config.watchdog.save_seconds
        self.watchdog.leave(limit + COLLECTIVE_MARGIN_SECONDS)
        self.saver.join(limit)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        if "loader" in saved.state:  # an imported model has none
            self.position = self.loader.resume(saved.state["loader"])
        if saved.manifest["model"] != self.config.model.model_dump():
            raise InputError(f"{saved.path}: holds a model of another size or dropout than `model` in the configuration")
        self.origin = {key: saved.state[key] for key in ("imported", WENT_BACK_TO) if key in saved.state} | self.origin
        bad_steps = saved.state.get("bad_steps")
        self.bad_steps = BadSteps(self.config.bad_steps, self.world.device, bad_steps)
        self.bad_in_a_row = 0 if bad_steps is None else int(bad_steps["in_a_row"])
        self.optimizer_step = int(saved.state.get("optimizer_step", 0))
        zero_state.load(self.engine, saved)
        self.step = saved.step
        if self.world.is_first:
            log(f"resumed from {saved.path} (saved by {saved.manifest['world_size']} ranks, here {self.world.size})")

    def run(self, profile_steps: int = 0) -> dict[str, Any]:
        if self.step < self.last:
            data, items = self.config.data, self.loader.steps(self.position, self.step)
            self.batches = Prefetch(
                items, data.prefetch_steps, data.stall_seconds, self.loader.train_pool.in_flight, self._told_to_stop
            )
            self.profile = Profile(self.run_dir, self.world.rank, self.step + 1, profile_steps) if profile_steps else None
            self.interval.restart()
            try:
                self._train()
                self._wait_for_save()
            finally:
                self.batches.close()
                if self.profile:
                    self.profile.close()
        if self.metrics:
            self.metrics.close()
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None  # JSON has no NaN
        return {"run_dir": str(self.run_dir), "step": self.step, "loss": loss, "ranks": self.world.size}

    def _train(self) -> None:
        train, validation, limits = self.config.train, self.config.validation, self.config.watchdog
        first, last, save_due = self.step, self.last, False
        while self.step < last:
            if self.step > first:  # the first step of a life may compile
                self.watchdog.enter(f"step {self.step + 1}", limits.step_seconds)
                if self.step == first + 1:
                    self.world.limit_collectives(limits.step_seconds + COLLECTIVE_MARGIN_SECONDS)
            self.interval.timer.start_step()
            batches, masked = self._next_batches()
            self._train_step(batches, masked)
            self.interval.timer.end_step()
            self.position += batch_size(train, self.step)
            self.step += 1
            if self.profile:
                self.profile.step_done(self.step)
            validate = validation.every > 0 and (self.step % validation.every == 0 or self.step == last)
            if validate or self.step % train.log_every == 0 or self.step in (1, last):
                self._report(validate)
            save_due |= self.step % self.config.checkpoint.save_every == 0
            if save_due:
                self._read_steps()
            # Not among bad steps: a run that has diverged must not push good checkpoints out with the same bad weights.
            if (save_due and self.bad_in_a_row == 0) or self.step == last:
                self._save()
                save_due = False

    def _next_batches(self) -> tuple[list[MaskedBatch], float]:
        """This rank's micro batches, and the masked tokens of the global batch.

        The sum that every step needs also says whether a rank was told to stop, has no data or could not write a checkpoint.
        Raises StopRequested, with the step saved, or what went wrong.
        """
        batches: list[MaskedBatch] = []
        failure = self.saver.failure
        try:
            batches = next(self.batches)
        except StopRequested:
            pass  # told to stop while there was no data; the others hear of it below
        except Exception as error:
            failure = failure or error
        masked, sequences, stops = self.world.agree(
            failure,
            sum(len(batch.labels_m) for batch in batches),
            sum(len(batch.positions_b) for batch in batches),
            self._told_to_stop(),
        )
        if stops:
            if self.saved_step != self.step:
                self._save()
            self._wait_for_save()
            raise StopRequested(f"{self.stop.received or 'another rank was told to stop'}: step {self.step} is saved")
        if sequences == 0:
            raise InputError(f"step {self.step + 1}: all its sequences are in damaged blocks; shard the data again")
        return batches, masked

    def _train_step(self, batches: list[MaskedBatch], masked: float) -> None:
        size = batch_size(self.config.train, self.step)
        self.steps.take(batches, masked, self.step, self.position, size)
        self.interval.add(batches)

    def _read_steps(self) -> Taken | None:
        """Hear what came of the steps since the last time, write the bad ones down, and return the newest; a collective.

        Raises RuntimeError where too many in a row were bad.
        """
        newest, too_many = None, None
        for newest in self.steps.read():
            self.loss, self.bad_in_a_row = newest.loss, newest.in_a_row
            if newest.reason is None:
                self.optimizer_step += 1
                continue
            self.interval.skipped_steps += 1
            if self.bad_steps_file:
                self._describe_bad_step(newest, self.bad_steps_file)
            if newest.in_a_row >= self.config.bad_steps.stop_after:
                too_many = newest
        if too_many:
            self._wait_for_save()  # it may be the step to go back to
            before = too_many.step - too_many.in_a_row
            good = [step for step in checkpoint.steps(self.run_dir) if step <= before]
            back_to = good[-1] if good else "N (none is saved before them: start again)"
            raise RuntimeError(
                f"step {too_many.step}: {too_many.in_a_row} bad steps in a row (RUN_DIR/bad_steps.jsonl); go back "
                f"with --from-step {back_to} and a lower optimizer.learning_rate, or other data"
            )
        return newest

    def _describe_bad_step(self, bad: Taken, file: BadStepsFile) -> None:
        """Write down which sequences were in a step that was left out."""
        sequences = described(self.loader, self.config, self.world.size, bad.position, bad.size, bad.suspects)
        file.write({"step": bad.step, "reason": bad.reason, "loss": bad.loss, "grad_norm": bad.grad_norm} | sequences)
        log(f"step {bad.step}: {bad.reason}: no update ({bad.in_a_row} in a row); its sequences are in {file.path}")

    def _report(self, validate: bool) -> None:
        """Write down the step just taken; a collective."""
        taken = self._read_steps()
        assert taken is not None  # the step just taken has not been read before
        record = {
            "loss": taken.loss,
            "masked_accuracy": taken.masked_accuracy,
            "grad_norm": taken.grad_norm,
            "learning_rate": taken.learning_rate,
            **self.interval.record(self.batches.waited),
        }
        if validate:
            record |= self.validation.run(self.step)
        if self.metrics:
            self.metrics.write({"step": self.step, **record})
        self.interval.restart()
        self.batches.waited = 0.0

    def _told_to_stop(self) -> bool:
        return self.stop.received is not None

    def _numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def _wait_for_save(self) -> None:
        """Return when the save under way is committed, on every rank."""
        self.watchdog.enter(f"waiting for the checkpoint before step {self.step}", self.config.watchdog.save_seconds)
        self.world.limit_collectives(self.config.watchdog.save_seconds + COLLECTIVE_MARGIN_SECONDS)
        failure: Exception | None = None
        try:
            self.saver.wait()
        except Exception as error:
            failure = error
        self.world.agree(failure)

    def _save(self) -> None:
        """Begin to save the current step; it is committed while training goes on."""
        self._read_steps()
        began = time.perf_counter()
        self._wait_for_save()
        failure: Exception | None = None
        if self.metrics:
            try:
                self.metrics.flush()  # first: what is older than a committed step is never written again
                self.saver.check_space(self._numel())
            except Exception as error:
                failure = error
        self.world.agree(failure)
        fragments = zero_state.owned_fragments(self.engine, self.world.rank, self.world.size)
        self.saver.start(self.step, fragments, self.shapes, self.config.model.model_dump(), self._state())
        stall = self.world.max(time.perf_counter() - began)
        self.interval.checkpoint_stall_seconds += stall
        if self.world.is_first:
            log(f"saving step {self.step}: training stood still for {stall * 1e3:.0f} ms")
        self.saved_step = self.step
        self.world.limit_collectives(self.config.watchdog.step_seconds + COLLECTIVE_MARGIN_SECONDS)

    def _state(self) -> dict[str, Any]:
        """Everything beside weights and moments: what a later loss depends on, and what made this step."""
        packages = ("torch", "deepspeed", "numpy", "safetensors")
        return {
            "optimizer_step": self.optimizer_step,
            "bad_steps": self.bad_steps.state(),
            "loader": self.loader.state(self.position),
            "config_sha256": hashlib.sha256(dump_json(self.config.model_dump(mode="json"))).hexdigest(),
            "zero_stage": self.config.deepspeed.zero_stage,
            "dtype": self.config.train.dtype,
            "device": self.world.device.type,
            "implementations": {**self.kernels, "optimizer": name_of(self.config.optimizer)},
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
            **self.origin,
        }
