"""The main job: train, validate, save, and go on after anything.

A run is its directory. Running the same command again resumes from the newest checkpoint that verifies, on however many
ranks there are now; a finished run is left as it is. See `docs/design.md` for what stays identical.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from data_prep.cli import (
    BAD_INPUT,
    DONE,
    FAILED,
    RUN_AGAIN,
    InputError,
    StopRequested,
    dump_json,
    log,
    one_line,
    write_atomically,
)
from data_prep.dataset import Dataset
from pretrain import checkpoint, zero_state
from pretrain.config import Config, parse_config, refuse_changes
from pretrain.distributed import StopSignal, World, environment_rank, start
from pretrain.engine import build_engine, gradient_norm_before_step, learning_rate, set_learning_rate
from pretrain.loader import Loader, open_dataset
from pretrain.metrics import Metrics


def train(config: Config) -> dict[str, Any]:
    """Run until `train.max_steps` or `train.stop_at_step`; returns step, last loss and where the checkpoint is.

    Writes RUN_DIR/exit.json in every case that leaves it time to. Raises StopRequested after SIGTERM or SIGUSR1, with the
    step saved, and InputError for what can't be trained on.
    """
    run_dir = Path(config.run_dir)
    first = environment_rank() == 0
    exit_path = run_dir / "exit.json"
    if first:
        exit_path.unlink(missing_ok=True)
    status, reason = FAILED, ""
    result: dict[str, Any] = {}
    try:
        result = _Run(config, run_dir).run()
        status, reason = DONE, "done"
    except StopRequested as stop:
        status, reason = RUN_AGAIN, str(stop)
        raise
    except InputError as error:
        status, reason = BAD_INPUT, one_line(error)
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise
    finally:
        if first and run_dir.is_dir():
            saved = checkpoint.steps(run_dir)
            record = {"status": status, "reason": reason, "checkpoint_step": saved[-1] if saved else None}
            record["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            write_atomically(exit_path, dump_json(record))
    return result


class _Run:
    """One life of a run, on one rank."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.stop = StopSignal()
        # Everything that can be wrong with the input is found before the other ranks are waited for.
        config, dataset = open_dataset(config)
        self.config, self.run_dir = config, run_dir
        _check_run_dir(config, run_dir, dataset)
        self.world: World = start()
        if self.world.is_first:
            _prepare_run_dir(config, run_dir, dataset)
        self.loader = Loader(config, dataset, self.world.rank, self.world.size)
        # Temporaries carry it, so it must be the same on every rank: the first one's start and process.
        self.life = f"{self.world.share(int(time.time()))}-{self.world.share(os.getpid())}"
        found = checkpoint.recover(run_dir, self.life) if self.world.is_first else None
        step = self.world.share(-1 if found is None else found.step)
        self.engine = build_engine(config, self.world)
        self.step = max(step, 0)
        self.origin: dict[str, Any] = {}  # of an imported model; passed on from checkpoint to checkpoint
        if step < 0:
            zero_state.reset_optimizer(self.engine)
        else:
            self._restore(checkpoint.Checkpoint(checkpoint.step_path(run_dir, step)))
        self.metrics = Metrics(run_dir, self.step, config.train.max_steps) if self.world.is_first else None
        self.loss: float | None = None
        self._interval_tokens, self._interval_start = 0, time.perf_counter()

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        if "loader" in saved.state:  # an imported model has none
            self.loader.check_state(saved.state["loader"])
        if saved.manifest["model"] != self.config.model.model_dump():
            raise InputError(f"{saved.path}: holds a model of another size or dropout than `model` in the configuration")
        self.origin = {key: saved.state[key] for key in ("imported",) if key in saved.state}
        zero_state.load(self.engine, saved)
        if self.world.is_first:
            log(f"resumed from {saved.path} (saved by {saved.manifest['world_size']} ranks, here {self.world.size})")

    def run(self) -> dict[str, Any]:
        train = self.config.train
        last = train.max_steps if train.stop_at_step is None else min(train.stop_at_step, train.max_steps)
        saved_step = self.step if checkpoint.steps(self.run_dir) else None
        while self.step < last:
            batches = self.loader.step(self.step * train.global_batch_size)
            masked, stops = self.world.sum(sum(len(b.labels_m) for b in batches), self.stop.received is not None)
            if stops:
                if saved_step != self.step:
                    self._save()
                raise StopRequested(f"{self.stop.received or 'another rank was told to stop'}: step {self.step} is saved")
            record = self._train_step(batches, masked)
            self.step += 1
            at = self.config.validation.every
            validate = at > 0 and (self.step % at == 0 or self.step == last)
            if validate or self.step % train.log_every == 0 or self.step in (1, last):
                self._report(record, validate)
            if self.step % self.config.checkpoint.save_every == 0 or self.step == last:
                self._save()
                saved_step = self.step
        if self.metrics:
            self.metrics.close()
        return {"run_dir": str(self.run_dir), "step": self.step, "loss": self.loss, "ranks": self.world.size}

    def _train_step(self, batches: list[Any], masked: float) -> dict[str, Any]:
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
        return {"loss": loss_sum, "correct": correct_sum, "masked": masked, "norm": norm}

    def _report(self, record: dict[str, Any], validate: bool) -> None:
        """Gather the sums of the step just taken from all ranks and write them down; a collective."""
        loss, correct, tokens = self.world.sum(float(record["loss"]), int(record["correct"]), self._interval_tokens)
        seconds = time.perf_counter() - self._interval_start
        norm = record["norm"] if record["norm"] is not None else float(self.engine.get_global_grad_norm())
        self.loss = loss / max(record["masked"], 1.0)
        values = {
            "step": self.step,
            "loss": self.loss,
            "masked_accuracy": correct / max(record["masked"], 1.0),
            "grad_norm": norm,
            "learning_rate": learning_rate(self.config.optimizer, self.step - 1, self.config.train.max_steps),
            "tokens_per_second": tokens / seconds,
        }
        if validate:
            values |= self._validate()
        if self.metrics:
            self.metrics.write(values)
        self._interval_tokens, self._interval_start = 0, time.perf_counter()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss (nats a masked token) and accuracy over the validation sequences, without dropout."""
        self.engine.eval()
        loss_sum, correct_sum, masked = 0.0, 0, 0
        for batch in self.loader.validation():
            batch = batch.to(self.world.device)
            loss, correct = self.engine(batch.packed, batch.index_m, batch.labels_m)
            loss_sum, correct_sum = loss_sum + loss.double(), correct_sum + correct
            masked += len(batch.labels_m)
        self.engine.train()
        loss, correct, count = self.world.sum(float(loss_sum), int(correct_sum), masked)
        if count == 0:  # an empty validation split has no loss, not one of 0
            return {}
        return {"validation_loss": loss / count, "validation_masked_accuracy": correct / count}

    def _save(self) -> None:
        batch_size = self.config.train.global_batch_size
        checkpoint.save(
            self.run_dir,
            step=self.step,
            life=self.life,
            fragments=zero_state.owned_fragments(self.engine, self.world.rank, self.world.size),
            shapes=zero_state.shapes(self.engine),
            model=self.config.model.model_dump(),
            state={
                "optimizer_step": self.step,
                "loader": self.loader.state(self.step * batch_size),
                "zero_stage": self.config.deepspeed.zero_stage,
                "dtype": self.config.train.dtype,
                "versions": {"torch": torch.__version__},
                **self.origin,
            },
            rank=self.world.rank,
            world_size=self.world.size,
            barrier=self.world.barrier,
        )
        if self.metrics:
            self.metrics.flush()
            checkpoint.retain(self.run_dir, self.config.checkpoint.keep_last)
            log(f"saved step {self.step} in {self.run_dir / 'checkpoints'}")


def _check_run_dir(config: Config, run_dir: Path, dataset: Dataset) -> None:
    """Refuse a directory that holds another run; every rank looks, so that none waits for one that has left."""
    saved, tokenizer = run_dir / "config.yaml", run_dir / "tokenizer.json"
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"{run_dir}: run_dir is not a directory")
    if saved.is_file():
        refuse_changes(config, parse_config(yaml.safe_load(saved.read_text()), str(saved)), saved)
    if tokenizer.is_file() and tokenizer.read_bytes() != dataset.tokenizer_path.read_bytes():
        raise InputError(f"{tokenizer}: differs from the tokenizer of {dataset.path}; use another run_dir")


def _prepare_run_dir(config: Config, run_dir: Path, dataset: Dataset) -> None:
    """Write the resolved configuration and a copy of the tokenizer: the run explains itself wherever it is copied."""
    write_atomically(run_dir / "tokenizer.json", dataset.tokenizer_path.read_bytes())
    write_atomically(run_dir / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
