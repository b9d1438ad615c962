"""The main job: train, validate, save, and go on after anything.

A run is its directory. Running the same command again resumes from the newest checkpoint that verifies, on however many
ranks there are now; a finished run is left as it is. See `docs/design.md` for what stays identical.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_prep.cli import BAD_INPUT, FAILED, HUNG, Hung, InputError, StopRequested, dump_json, exit_status, log
from pretrain import checkpoint, run_directory, zero_state
from pretrain.blocks import BlockPool
from pretrain.config import Config
from pretrain.distributed import StopSignal, World, environment_rank, start
from pretrain.engine import build_engine, gradient_norm_before_step, learning_rate, set_learning_rate
from pretrain.loader import Loader, MaskedBatch, open_dataset
from pretrain.metrics import Metrics
from pretrain.prefetch import Prefetch

Item = TypeVar("Item")
NO_CHECKPOINT, UNUSABLE = -1, -2  # what rank 0 shares instead of a step


def train(config: Config) -> dict[str, Any]:
    """Run until `train.max_steps` or `train.stop_at_step`; returns the step, the last loss and the number of ranks.

    Rank 0 writes RUN_DIR/exit.json in every case that leaves it time to. Raises StopRequested after SIGTERM or SIGUSR1, with
    the step saved, InputError for what can't be trained on, and RuntimeError when the loss is not a number any more.
    """
    run_dir, first = Path(config.run_dir), environment_rank() == 0
    if first:
        (run_dir / "exit.json").unlink(missing_ok=True)
    failure: BaseException | None = None
    try:
        result = _Run(config, run_dir).run()
    except BaseException as error:
        failure = error
        raise
    finally:
        if first and (run_dir.is_dir() or not run_dir.exists()):
            run_directory.write_exit(run_dir, failure)
        if dist.is_initialized() and (failure is None or isinstance(failure, StopRequested)):
            dist.destroy_process_group()
    return result


class _Run:
    """One life of a run, on one rank."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.stop = StopSignal()
        # What is wrong with the input is found by every rank alone, before it waits for the others.
        self.config, dataset = open_dataset(config)
        self.run_dir = run_dir
        run_directory.check(self.config, run_dir, dataset)
        self.world: World = start()
        self.loader = Loader(self.config, dataset, self.world.rank, self.world.size, pin=self.world.device.type == "cuda")
        # Temporaries carry it, so it must be the same on every rank: the first one's start and process.
        self.life = f"{self.world.share(int(time.time()))}-{self.world.share(os.getpid())}"
        found = self._find_checkpoint()
        self.engine = build_engine(self.config, self.world)
        self.step, self.saved_step = 0, None if found is None else found.step
        self.position = 0  # in the order of training, where the next global batch begins
        self.origin: dict[str, Any] = {}  # of an imported model; passed on from checkpoint to checkpoint
        if found is None:
            zero_state.reset_optimizer(self.engine)
        else:
            self._restore(found)
        self.metrics = None
        if self.world.is_first:  # only now: nothing is written for a run that can't start
            run_directory.describe(self.config, run_dir, dataset)
            self.metrics = Metrics(run_dir, self.step, self.config.train.max_steps)
        self.loss: float | None = None
        self._validation: list[MaskedBatch] | None = None
        self._interval_tokens, self._interval_skipped, self._interval_start = 0, 0, time.perf_counter()

    def _find_checkpoint(self) -> checkpoint.Checkpoint | None:
        """The step to go on from: rank 0 looks, all ranks open what it found or fail together."""
        step, failure = NO_CHECKPOINT, InputError("rank 0 found no checkpoint to go on from; see its message")
        if self.world.is_first:
            try:
                found = checkpoint.recover(self.run_dir, self.life)
                step = NO_CHECKPOINT if found is None else found.step
            except InputError as error:
                step, failure = UNUSABLE, error
        step = self.world.share(step)
        if step == UNUSABLE:
            raise failure
        return None if step == NO_CHECKPOINT else checkpoint.Checkpoint(checkpoint.step_path(self.run_dir, step))

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        if "loader" in saved.state:  # an imported model has none
            self.position = self.loader.resume(saved.state["loader"])
        if saved.manifest["model"] != self.config.model.model_dump():
            raise InputError(f"{saved.path}: holds a model of another size or dropout than `model` in the configuration")
        self.origin = {key: saved.state[key] for key in ("imported",) if key in saved.state}
        zero_state.load(self.engine, saved)
        self.step = saved.step
        if self.world.is_first:
            log(f"resumed from {saved.path} (saved by {saved.manifest['world_size']} ranks, here {self.world.size})")

    def run(self) -> dict[str, Any]:
        train = self.config.train
        last = train.max_steps if train.stop_at_step is None else min(train.stop_at_step, train.max_steps)
        if self.step < last:
            self.batches = self._prefetch(self.loader.steps(self.position), self.loader.train_pool)
            try:
                self._train_until(last)
            finally:
                self.batches.close()
        if self.metrics:
            self.metrics.close()
        return {"run_dir": str(self.run_dir), "step": self.step, "loss": self.loss, "ranks": self.world.size}

    def _train_until(self, last: int) -> None:
        train, validation = self.config.train, self.config.validation
        while self.step < last:
            batches, masked = self._next_batches()
            record = self._train_step(batches, masked)
            self.step += 1
            self.position += train.global_batch_size
            validate = validation.every > 0 and (self.step % validation.every == 0 or self.step == last)
            report = validate or self.step % train.log_every == 0 or self.step in (1, last)
            save = self.step % self.config.checkpoint.save_every == 0 or self.step == last
            if report or save:
                values = self._gather(record)
                if report:
                    self._report(values, validate)
                if save:
                    self._save()

    def _next_batches(self) -> tuple[list[MaskedBatch], float]:
        """This rank's micro batches, and the masked tokens of the global batch.

        The sum that every step needs also says whether a rank was told to stop or has no data, and why, so that all ranks
        leave together and with the same status. Raises StopRequested, with the step saved, or what the loader raised.
        """
        batches: list[MaskedBatch] = []
        failure: Exception | None = None
        try:
            batches = next(self.batches)
        except Exception as error:
            failure = error
        masked, sequences, stops = self._agree(
            failure,
            sum(len(batch.labels_m) for batch in batches),
            sum(len(batch.positions_b) for batch in batches),
            self.stop.received is not None,
        )
        if sequences == 0:
            raise InputError(f"step {self.step + 1}: all its sequences are in damaged blocks; shard the data again")
        if stops:
            if self.saved_step != self.step:
                self._save()
            raise StopRequested(f"{self.stop.received or 'another rank was told to stop'}: step {self.step} is saved")
        return batches, masked

    def _agree(self, failure: Exception | None, *values: float) -> list[float]:
        """Sums of `values` over all ranks, if none of them failed. Raises this rank's `failure`, or one of its kind."""
        statuses = (HUNG, BAD_INPUT, FAILED)
        mine = None if failure is None else exit_status(failure)
        *sums, hung, bad_input, failed = self.world.sum(*values, *(mine == status for status in statuses))
        if hung + bad_input + failed == 0:
            return sums
        rank = int(self.world.max(-1 if failure is None else self.world.rank))
        kind = Hung if hung else InputError if bad_input else RuntimeError
        raise failure or kind(f"rank {rank} can't read its data; see its message in the log")

    def _train_step(self, batches: list[MaskedBatch], masked: float) -> dict[str, Any]:
        """One optimizer step; returns this rank's sums, still on the device."""
        set_learning_rate(self.engine, learning_rate(self.config.optimizer, self.step, self.config.train.max_steps))
        # DeepSpeed averages over micro batches and ranks; the loss is the mean over the masked tokens of the whole batch.
        scale = self.world.size * len(batches) / max(masked, 1.0)
        loss_sum, correct_sum, norm = 0.0, 0, None
        for number, batch in enumerate(batches):
            batch = batch.to(self.world.device)
            loss, correct = self.engine(batch.packed, batch.index_m, batch.labels_m)
            self.engine.backward(loss * scale)
            loss_sum, correct_sum = loss_sum + loss.detach().double(), correct_sum + correct
            if number == len(batches) - 1:
                norm = gradient_norm_before_step(self.engine)
            self.engine.step()
        self._interval_tokens += sum(len(batch.packed.ids_t) for batch in batches)
        self._interval_skipped += sum(batch.skipped for batch in batches)
        return {"loss": loss_sum, "correct": correct_sum, "masked": masked, "norm": norm}

    def _gather(self, record: dict[str, Any]) -> dict[str, float]:
        """Sums of the step just taken over all ranks; a collective. Raises RuntimeError when they are not finite."""
        loss, correct, tokens, skipped = self.world.sum(
            float(record["loss"]), int(record["correct"]), self._interval_tokens, self._interval_skipped
        )
        norm = record["norm"] if record["norm"] is not None else float(self.engine.get_global_grad_norm())
        self.loss = loss / max(record["masked"], 1.0)
        if not (math.isfinite(self.loss) and math.isfinite(norm)):
            raise RuntimeError(
                f"step {self.step}: loss {self.loss}, gradient norm {norm}; this step is not saved, the run can go on from "
                f"step {self.saved_step or 0}, in another run_dir with a lower learning rate"
            )
        return {
            "loss": self.loss,
            "masked_accuracy": correct / max(record["masked"], 1.0),
            "grad_norm": norm,
            "learning_rate": learning_rate(self.config.optimizer, self.step - 1, self.config.train.max_steps),
            "tokens_per_second": tokens / (time.perf_counter() - self._interval_start),
            "data_wait_seconds": self.world.max(self.batches.waited),
            **({"skipped_sequences": skipped} if skipped else {}),
        }

    def _report(self, values: dict[str, float], validate: bool) -> None:
        """Write down the step just taken; a collective when it validates."""
        if validate:
            values |= self._validate()
        if self.metrics:
            self.metrics.write({"step": self.step, **values})
        self._interval_tokens, self._interval_skipped, self._interval_start = 0, 0, time.perf_counter()
        self.batches.waited = 0.0

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss (nats a masked token) and accuracy over the validation sequences, without dropout."""
        self.engine.eval()
        loss_sum, correct_sum, masked = 0.0, 0, 0
        for batch in self._validation_batches():
            batch = batch.to(self.world.device)
            loss, correct = self.engine(batch.packed, batch.index_m, batch.labels_m)
            loss_sum, correct_sum = loss_sum + loss.double(), correct_sum + correct
            masked += len(batch.labels_m)
        self.engine.train()
        loss, correct, count = self.world.sum(float(loss_sum), int(correct_sum), masked)
        if count == 0:  # an empty validation split has no loss, not one of 0
            return {}
        return {"validation_loss": loss / count, "validation_masked_accuracy": correct / count}

    def _validation_batches(self) -> list[MaskedBatch]:
        """This rank's validation batches, always the same, so read once. A rank that can't read them fails all alike."""
        if self._validation is None:
            failure: Exception | None = None
            batches = self._prefetch(self.loader.validation(), self.loader.valid_pool)
            try:
                self._validation = list(batches)
            except Exception as error:
                failure = error
            batches.close()
            (skipped,) = self._agree(failure, sum(batch.skipped for batch in self._validation or []))
            if skipped and self.world.is_first:
                log(f"{skipped:.0f} validation sequences are in damaged blocks and left out")
        return self._validation or []

    def _prefetch(self, items: Iterator[Item], pool: BlockPool) -> Prefetch[Item]:
        data = self.config.data
        return Prefetch(items, data.prefetch_steps, data.stall_seconds, pool.in_flight)

    def _save(self) -> None:
        """Commit the current step; every rank returns when rank 0 has tidied up, so none leaves before it."""
        if self.metrics:
            self.metrics.flush()  # first: what is older than a committed step is never written again
        checkpoint.save(
            self.run_dir,
            step=self.step,
            life=self.life,
            fragments=zero_state.owned_fragments(self.engine, self.world.rank, self.world.size),
            shapes=zero_state.shapes(self.engine),
            model=self.config.model.model_dump(),
            state=self._state(),
            rank=self.world.rank,
            world_size=self.world.size,
            barrier=self.world.barrier,
        )
        self.saved_step = self.step
        if self.world.is_first:
            checkpoint.retain(self.run_dir, self.config.checkpoint.keep_last)
            log(f"saved step {self.step} in {self.run_dir / 'checkpoints'}")
        self.world.barrier()

    def _state(self) -> dict[str, Any]:
        """Everything beside weights and moments: what a later loss depends on, and what made this step."""
        packages = ("torch", "deepspeed", "numpy", "safetensors")
        return {
            "optimizer_step": self.step,
            "loader": self.loader.state(self.position),
            "config_sha256": hashlib.sha256(dump_json(self.config.model_dump(mode="json"))).hexdigest(),
            "zero_stage": self.config.deepspeed.zero_stage,
            "dtype": self.config.train.dtype,
            "device": self.world.device.type,
            "implementations": {"kernels": "torch", "optimizer": "torch.optim.AdamW(fused=True)"},
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
            **self.origin,
        }
