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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_prep.cli import InputError, StopRequested, dump_json, log
from data_prep.dataset import Dataset
from pretrain import checkpoint, run_directory, zero_state, zero_step
from pretrain.bad_steps import BadSteps, BadStepsFile, described
from pretrain.blocks import BlockPool
from pretrain.config import Config
from pretrain.distributed import StopSignal, World, environment_rank, start
from pretrain.engine import build_engine, learning_rate, set_learning_rate
from pretrain.interval import Interval
from pretrain.lease import Lease, LeaseLost
from pretrain.loader import Loader, MaskedBatch, open_dataset
from pretrain.metrics import Metrics
from pretrain.prefetch import Prefetch
from pretrain.profiling import Profile
from pretrain.resume import WENT_BACK_TO, find_checkpoint
from pretrain.saver import Saver
from pretrain.watchdog import Watchdog

Item = TypeVar("Item")
COLLECTIVE_MARGIN_SECONDS = 120.0  # by which the watchdog comes before the time-out of collectives


def train(config: Config, from_step: int | None = None, profile_steps: int = 0) -> dict[str, Any]:
    """Run until `train.max_steps` or `train.stop_at_step`; returns the step, the last loss and the number of ranks.

    Rank 0 writes RUN_DIR/exit.json in every case that leaves it time to, unless another life holds the directory. Raises
    StopRequested after SIGTERM or SIGUSR1, with the step saved, InputError for what can't be trained on, Hung when another
    rank is lost, and RuntimeError when too many steps in a row are bad.

    Args:
        from_step: go back to this checkpoint; the steps after it are set aside.
        profile_steps: steps of this life that torch's profiler records, after some to warm up.
    """
    stop, run_dir, world, lease = StopSignal(), Path(config.run_dir), None, None
    refused: Exception | None = None
    failure: BaseException | None = None
    life = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    try:
        if environment_rank() == 0:
            try:
                lease = Lease.take(run_dir, life)
                (run_dir / "exit.json").unlink(missing_ok=True)
            except Exception as error:
                refused = error  # the others hear of it when they have come together
        # What is wrong with the input is found by every rank alone, before it waits for the others.
        config, dataset = open_dataset(config)
        run_directory.check(config, run_dir, dataset, from_step is not None)
        world = start(config.watchdog.start_seconds)
        return _Run(config, dataset, run_dir, world, life, lease, refused, stop, from_step).run(profile_steps)
    except BaseException as error:
        failure = error if world is None or isinstance(error, StopRequested) else world.explain(error)
        if failure is error:
            raise
        raise failure from error
    finally:
        if lease is not None:
            try:
                lease.check()
                run_directory.write_exit(run_dir, failure)
            except LeaseLost as error:
                log(str(error))
            lease.release()
        if world is not None and (failure is None or isinstance(failure, StopRequested)):
            dist.destroy_process_group()


class _Run:
    """One life of a run, on one rank."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        run_dir: Path,
        world: World,
        life: str,
        lease: Lease | None,
        refused: Exception | None,
        stop: StopSignal,
        from_step: int | None,
    ) -> None:
        self.config, self.run_dir, self.world, self.stop = config, run_dir, world, stop
        if world.is_first:
            world.store.set("life", life)
        self.life = world.store.get("life").decode()
        self.watchdog = Watchdog(run_dir, world.rank, world.size, self.life, world.store)
        self.watchdog.enter("starting", config.watchdog.start_seconds)
        world.agree(refused)
        self.loader = Loader(config, dataset, world.rank, world.size, pin=world.device.type == "cuda")
        found = find_checkpoint(run_dir, world, self.life, from_step)
        self.engine = build_engine(config, world)
        self.shapes = zero_state.shapes(self.engine)
        self.saver = Saver(run_dir, config.checkpoint, world, self.life, lease)
        self.step, self.saved_step = 0, None if found is None else found.step
        self.position = 0  # in the order of training, where the next global batch begins
        self.optimizer_step = 0  # of Adam: bad steps don't count
        # What passes on from checkpoint to checkpoint: an imported model's source, a step that the run went back to.
        self.origin: dict[str, Any] = {} if from_step is None else {WENT_BACK_TO: from_step}
        self.bad_steps = BadSteps(config.bad_steps)
        if found is None:
            zero_state.load(
                self.engine, zero_state.InitialState(self.shapes, config.train.seed, config.model.initializer_range)
            )
        else:
            self._restore(found)
        self.metrics = self.bad_steps_file = None
        failure: Exception | None = None
        if world.is_first:  # only now: nothing is written for a run that can't start
            try:
                self.saver.check_space(self._numel())
                run_directory.describe(config, run_dir, dataset)
                self.metrics = Metrics(run_dir, self.step, config.train.max_steps)
                self.bad_steps_file = BadStepsFile(run_dir, self.step)
            except Exception as error:
                failure = error
        world.agree(failure)
        self.loss: float | None = None
        self._validation: list[tuple[str, MaskedBatch]] | None = None
        self.interval = Interval(config, world)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        if "loader" in saved.state:  # an imported model has none
            self.position = self.loader.resume(saved.state["loader"])
        if saved.manifest["model"] != self.config.model.model_dump():
            raise InputError(f"{saved.path}: holds a model of another size or dropout than `model` in the configuration")
        self.origin = {key: saved.state[key] for key in ("imported", WENT_BACK_TO) if key in saved.state} | self.origin
        self.bad_steps = BadSteps(self.config.bad_steps, saved.state.get("bad_steps"))
        self.optimizer_step = int(saved.state.get("optimizer_step", 0))
        zero_state.load(self.engine, saved)
        self.step = saved.step
        if self.world.is_first:
            log(f"resumed from {saved.path} (saved by {saved.manifest['world_size']} ranks, here {self.world.size})")

    def run(self, profile_steps: int = 0) -> dict[str, Any]:
        train = self.config.train
        last = train.max_steps if train.stop_at_step is None else min(train.stop_at_step, train.max_steps)
        if self.step < last:
            self.batches = self._prefetch(self.loader.steps(self.position), self.loader.train_pool, self._told_to_stop)
            self.profile = Profile(self.run_dir, self.world.rank, self.step + 1, profile_steps) if profile_steps else None
            self.interval.restart()
            try:
                self._train_until(last)
                self._wait_for_save()
            finally:
                self.batches.close()
                if self.profile:
                    self.profile.close()
        self.watchdog.close()
        if self.metrics:
            self.metrics.close()
        return {"run_dir": str(self.run_dir), "step": self.step, "loss": self.loss, "ranks": self.world.size}

    def _train_until(self, last: int) -> None:
        train, validation, limits = self.config.train, self.config.validation, self.config.watchdog
        first, save_due = self.step, False
        while self.step < last:
            if self.step > first:  # the first step of a life may compile
                self.watchdog.enter(f"step {self.step + 1}", limits.step_seconds)
                if self.step == first + 1:
                    self.world.limit_collectives(limits.step_seconds + COLLECTIVE_MARGIN_SECONDS)
            self.interval.timer.start_step()
            batches, masked = self._next_batches()
            record = self._train_step(batches, masked)
            self.interval.timer.end_step()
            self.step += 1
            self.position += train.global_batch_size
            if self.profile:
                self.profile.step_done(self.step)
            if self.bad_steps.in_a_row >= self.config.bad_steps.stop_after:
                raise RuntimeError(
                    f"step {self.step}: {self.bad_steps.in_a_row} bad steps in a row (RUN_DIR/bad_steps.jsonl); go back "
                    f"with --from-step {self._step_before_bad_ones()} and a lower optimizer.learning_rate, or other data"
                )
            validate = validation.every > 0 and (self.step % validation.every == 0 or self.step == last)
            if validate or self.step % train.log_every == 0 or self.step in (1, last):
                self._report(record, validate)
            save_due |= self.step % self.config.checkpoint.save_every == 0
            # Not among bad steps: a run that has diverged must not push good checkpoints out with the same bad weights.
            if (save_due and self.bad_steps.in_a_row == 0) or self.step == last:
                self._save()
                save_due = False

    def _step_before_bad_ones(self) -> int | str:
        good = [step for step in checkpoint.steps(self.run_dir) if step <= self.step - self.bad_steps.in_a_row]
        return good[-1] if good else "N (none is saved before them: start again)"

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

    def _train_step(self, batches: list[MaskedBatch], masked: float) -> dict[str, float]:
        """One optimizer step, or none where it would be a bad one; returns loss, accuracy and norm of all ranks."""
        rate = learning_rate(self.config.optimizer, self.step, self.config.train.max_steps)
        set_learning_rate(self.engine, rate)
        # DeepSpeed averages over micro batches and ranks; the loss is the mean over the masked tokens of the whole batch.
        scale = self.world.size * len(batches) / max(masked, 1.0)
        losses, correct_sum = [], 0
        for number, batch in enumerate(batches):
            on_device = batch.to(self.world.device)
            with self.interval.timer.compute():
                loss, correct = self.engine(on_device.packed, on_device.index_m, on_device.labels_m)
            self.engine.backward(loss * scale)
            losses.append(loss.detach().double())
            correct_sum = correct_sum + correct
            if number < len(batches) - 1:
                self.engine.step()
        norm = zero_step.gradient_norm(self.engine)
        loss_sum, correct_count = self.world.sum(float(torch.stack(losses).sum()), int(correct_sum))
        self.loss = loss_sum / max(masked, 1.0)
        bad = self.bad_steps.judge(self.loss, norm)
        zero_step.step(self.engine, skip=bad is not None)
        if bad is None:
            self.optimizer_step += 1
        else:
            self._describe_bad_step(bad, norm, losses)
        self.interval.add(batches)
        return {
            "loss": self.loss,
            "masked_accuracy": correct_count / max(masked, 1.0),
            "grad_norm": norm,
            "learning_rate": rate,
        }

    def _describe_bad_step(self, reason: str, norm: float, losses: list[torch.Tensor]) -> None:
        """Write down which sequences were in a step that is left out; a collective."""
        self.interval.skipped_steps += 1
        finite = [float(math.isfinite(float(loss))) for loss in losses]
        table = [0.0] * (self.world.size * len(losses))
        table[self.world.rank * len(losses) : (self.world.rank + 1) * len(losses)] = finite
        all_finite = self.world.sum(*table)
        if self.bad_steps_file:
            suspects = [number for number, value in enumerate(all_finite) if not value]
            record = described(self.loader, self.config, self.world.size, self.position, suspects)
            self.bad_steps_file.write(
                {"step": self.step + 1, "reason": reason, "loss": self.loss, "grad_norm": norm} | record
            )
            log(
                f"step {self.step + 1}: {reason}: no update ({self.bad_steps.in_a_row} in a row); its sequences are in "
                f"{self.bad_steps_file.path}"
            )

    def _report(self, record: dict[str, float], validate: bool) -> None:
        """Write down the step just taken; a collective."""
        record = record | self.interval.record(self.batches.waited)
        if validate:
            record |= self._validate()
        if self.metrics:
            self.metrics.write({"step": self.step, **record})
        self.interval.restart()
        self.batches.waited = 0.0

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss (nats a masked token) and accuracy over the validation sequences, without dropout; and by category."""
        batches = self._validation_batches()
        categories = sorted({category for category, _ in batches})
        sums = {category: torch.zeros(3, dtype=torch.float64, device=self.world.device) for category in categories}
        self.engine.eval()
        for category, batch in batches:
            self.watchdog.enter(f"validation after step {self.step}", self.config.watchdog.step_seconds)
            on_device = batch.to(self.world.device)
            loss, correct = self.engine(on_device.packed, on_device.index_m, on_device.labels_m)
            sums[category] += torch.stack([loss.double(), correct.double(), loss.new_tensor(len(batch.labels_m)).double()])
        self.engine.train()
        flat = self.world.sum(*(number for category in categories for number in sums[category].tolist()))
        rows = {category: flat[3 * i : 3 * i + 3] for i, category in enumerate(categories)}
        loss_sum, correct_sum, count = (sum(column) for column in zip(*rows.values(), strict=True)) if rows else (0, 0, 0)
        if count == 0:  # an empty validation split has no loss, not one of 0
            return {}
        by_category = {f"validation_loss/{c}": row[0] / row[2] for c, row in rows.items() if c and row[2]}
        return {"validation_loss": loss_sum / count, "validation_masked_accuracy": correct_sum / count, **by_category}

    def _validation_batches(self) -> list[tuple[str, MaskedBatch]]:
        """This rank's validation batches, always the same, so read once. A rank that can't read them fails all alike."""
        if self._validation is None:
            failure: Exception | None = None
            batches = self._prefetch(self.loader.validation(), self.loader.valid_pool)
            try:
                self._validation = list(batches)
            except Exception as error:
                failure = error
            batches.close()
            (skipped,) = self.world.agree(failure, sum(batch.skipped for _, batch in self._validation or []))
            if skipped and self.world.is_first:
                log(f"{skipped:.0f} validation sequences are in damaged blocks and left out")
        return self._validation or []

    def _prefetch(self, items: Iterator[Item], pool: BlockPool, stop: Callable[[], bool] = lambda: False) -> Prefetch[Item]:
        data = self.config.data
        return Prefetch(items, data.prefetch_steps, data.stall_seconds, pool.in_flight, stop)

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
        model, state = self.config.model.model_dump(), self._state()
        self.interval.checkpoint_stall_seconds += self.saver.start(self.step, fragments, self.shapes, model, state, began)
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
            "implementations": {"kernels": "torch", "optimizer": "torch.optim.AdamW(fused=True)"},
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
            **self.origin,
        }
