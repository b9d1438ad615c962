"""`python -m finetune bench`: fine-tuning beside what a user would do otherwise, Hugging Face's Trainer, in one run.

Both train the same weights on the same rows in the same batches with the same settings, dropout on. Ours lays a batch's
sequences end to end; the Trainer runs the exported model code (`pretrain/hf_modeling.py`: the same encoder in plain PyTorch,
attention by SDPA) and pads each batch to its longest sequence. Turns of some steps alternate, so that both meet the same
machine, and the median ratio of a turn's two times is the result. `padding_ratio`, the Trainer's tokens with padding by
those without, is what leaving out the padding alone allows; `share_of_padding` says how much of it is reached, and is over 1
where something else is faster too: of the last layer, ours computes only what [CLS] needs. Evaluation is of dev's rows: the
Trainer takes them in the order of the file, ours by length.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from data_prep.cli import InputError, dump_json, log, write_atomically
from data_prep.codec import open_tokenizer
from data_prep.synthesize import synthesize
from data_prep.tokenizing.train import train_bpe
from finetune.batches import pack
from finetune.data import Task, read_task
from finetune.metrics import Objective
from finetune.model import Classifier, build
from finetune.sources import MINIMUM_OCCURRENCES
from finetune.tasks import Settings
from finetune.tokens import Tokens, tokenize
from finetune.train import Step, batches, precision, predict, rate_factor
from pretrain.config import load_config
from pretrain.implementations import choose_alone
from pretrain.model import ModelConfig
from pretrain.pretrained import load_pretrained

WARM_UP = 3  # steps of each side that are not timed
SEED = 0
SMALLEST_GENOME = 100_000  # bases; the made-up task is what is wanted
LOSSES_DIFFER = {"fp32": 1e-3, "bf16": 5e-2}  # by more than this: then the two don't compute the same
Batch = tuple[NDArray[np.int64], NDArray[np.int64]]  # rows, and their positions in the order of training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a run or Hugging Face directory (default: random weights)"
    )
    parser.add_argument(
        "--like", metavar="CONFIG", help="preset or YAML file with the random weights' sizes (default: tiny)"
    )
    parser.add_argument("--sizes", nargs="+", default=[], metavar="KEY=VALUE", help="others, such as hidden_size=384")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="for random weights (default: a BPE of the task's rows)"
    )
    parser.add_argument("--task", type=Path, metavar="DIR", help="folder of train.csv and dev.csv (default: a made-up task)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences a step (default: 32)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps of each side a turn (default: 10)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="turns (default: 7)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matrix products (default: fp32)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--kernels", choices=["auto", "triton", "torch"], default="auto", help="of our side (default: auto)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result here too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: measure and log a summary."""
    for name in ("batch_size", "steps", "repeats", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    huggingface()
    task = read_task(args.task) if args.task else _made_up_task()
    config, weights, tokenizer = _model(args, task)
    tokens = {
        split: tokenize(task.splits[split], tokenizer, config.vocab_size, max_length=None) for split in ("train", "dev")
    }
    classifier = build(config, task.classes, weights, SEED, str(args.model))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads_before)
    try:
        result = bench(
            classifier,
            config,
            tokenizer,
            tokens["train"],
            tokens["dev"],
            settings=Settings(batch_size=args.batch_size, dtype=args.dtype),
            steps=args.steps,
            repeats=args.repeats,
            kernels=args.kernels,
        )
    finally:
        torch.set_num_threads(threads_before)
    result["setting"] |= {"task": task.name, "model": str(args.model or args.like or "tiny")}
    for part in ("training", "evaluation"):
        found = result[part]
        log(
            f"{part:10}  ours {found['tokens_per_second']['ours']:,.0f} tokens/s, the Trainer "
            f"{found['tokens_per_second']['huggingface']:,.0f}: ratio {found['ratio_huggingface']:.3f}, padding alone "
            f"allows {found['padding_ratio']:.3f}, share {found['share_of_padding']:.3f}"
        )
    if args.out:
        write_atomically(args.out, dump_json(result))
    return result


def huggingface() -> Any:
    """The module of the other side. InputError where what it needs is missing."""
    try:
        return importlib.import_module("finetune.bench_trainer")
    except ImportError as error:
        raise InputError(
            f"the bench compares with transformers' Trainer, which needs transformers and accelerate ({error}); "
            'install the extra "test": pip install -e ".[test]"'
        ) from None


def bench(
    classifier: Classifier,
    config: ModelConfig,
    tokenizer: Tokenizer,
    train_set: Tokens,
    dev_set: Tokens,
    *,
    settings: Settings,
    steps: int = 10,
    repeats: int = 7,
    kernels: str = "auto",
) -> dict[str, Any]:
    """Time `repeats` turns of `steps` steps of each side, and as many evaluations, on the GPU if there is one.

    Evaluation takes as many rows as a turn of training does, the first ones of dev. `classifier` is trained on the way.

    Returns:
        `training` and `evaluation`, each with `ratio_huggingface` (seconds of the Trainer / ours), `padding_ratio`,
        `share_of_padding`, tokens, tokens a second (without padding) and seconds of every turn; `loss`, of the first batch
        on both sides before and after training, without dropout; sizes, the setting and the versions; JSON.

    Raises InputError when transformers or accelerate is missing or there are fewer rows than a batch has, RuntimeError when
    the losses before training say that the two sides don't compute the same.
    """
    side = huggingface()
    if settings.batch_size > len(train_set.labels):
        raise InputError(f"--batch-size {settings.batch_size}: the task has only {len(train_set.labels)} rows to train on")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = max(int(tokens.lengths.max()) for tokens in (train_set, dev_set))
    names = choose_alone(config, device, torch.bfloat16 if settings.dtype == "bf16" else torch.float32, longest, kernels)
    now, objective = side.clock(device), Objective.of(classifier.outputs, train_set.labels)
    targets, collator = objective.targets(train_set.labels), side.Collator(tokenizer)
    theirs = side.model(config, classifier.outputs, classifier.state_dict()).to(device)
    ours = Step(classifier.to(device), train_set, objective, settings, SEED, device)
    plan = _plan(len(train_set.labels), settings, WARM_UP + steps * repeats)
    first = plan[0][0]
    padded = collator(side.items(train_set, targets, first)).to(device)

    def losses() -> dict[str, float]:
        return {"ours": _our_loss(ours, first), "huggingface": _their_loss(theirs, padded, settings)}

    before = losses()
    if abs(before["ours"] - before["huggingface"]) > LOSSES_DIFFER[settings.dtype]:
        raise RuntimeError(f"the two sides don't compute the same: the losses of the first batch are {before}")

    our_turn = OurTurn(ours, plan, now)
    turns = side.Turns(WARM_UP, steps, now, our_turn)
    items = side.items(train_set, targets, np.concatenate([rows for rows, _ in plan]))
    dev_set = _head(dev_set, steps * settings.batch_size)
    dev_items = side.items(dev_set, objective.targets(dev_set.labels), range(len(dev_set.labels)))
    # To stderr goes what libraries say on stdout, such as DeepSpeed, which accelerate imports where it is.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer = side.trainer(theirs, items, collator, turns, settings, Path(folder))
        collator.counts.clear()
        classifier.train()
        trainer.train()
        training = _compared(turns.seconds, sum(our_turn.tokens[1:]), collator.counts[WARM_UP : len(plan)], train_set)
        after = losses()
        collator.counts.clear()
        pairs = _alternate(
            repeats,
            now,
            lambda: trainer.predict(dev_items),
            lambda: predict(classifier, dev_set, objective, settings, device),
        )
        evaluation = _compared(
            pairs, repeats * len(dev_set.ids), collator.counts[len(collator.counts) // (1 + repeats) :], dev_set
        )
    return {
        "training": training,
        "evaluation": evaluation,
        "loss": {"before": before, "after": after},
        "kernels": names,
        "sizes": config.model_dump(),
        "setting": {
            "batch_size": settings.batch_size,
            "steps": steps,
            "repeats": repeats,
            "evaluated_rows": len(dev_set.labels),
            "dtype": settings.dtype,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **side.VERSIONS},
    }


class OurTurn:
    """Takes so many of our steps over the plan's next batches, with the learning rates of training; returns the seconds."""

    def __init__(self, step: Step, plan: list[Batch], now: Callable[[], float]) -> None:
        self.step, self.todo, self.total, self.now = step, enumerate(plan), len(plan), now
        self.tokens: list[int] = []  # of every turn

    def __call__(self, steps: int) -> float:
        before, settings, started = self.step.tokens, self.step.settings, self.now()
        for number, (rows, positions) in itertools.islice(self.todo, steps):
            rate = settings.learning_rate * rate_factor(number, settings.warmup_steps, self.total)
            self.step(rows, positions, rate)
        seconds = self.now() - started
        self.tokens.append(self.step.tokens - before)
        return seconds


def _alternate(
    repeats: int, now: Callable[[], float], theirs: Callable[[], object], ours: Callable[[], object]
) -> list[tuple[float, float]]:
    """Seconds of the two in every turn, after one that doesn't count."""
    pairs = []
    for _ in range(1 + repeats):
        started = now()
        theirs()
        middle = now()
        ours()
        pairs.append((middle - started, now() - middle))
    return pairs[1:]


def _plan(rows: int, settings: Settings, steps: int) -> list[Batch]:
    """Rows and positions of each step, as in training, but without the smaller batch at the end of an epoch."""
    full = (batch for batch in batches(SEED, rows, settings) if len(batch[1]) == settings.batch_size)
    return [(chosen, positions) for _, chosen, positions in itertools.islice(full, steps)]


@torch.inference_mode()
def _our_loss(step: Step, rows: NDArray[np.int64]) -> float:
    """Mean loss of a batch without dropout."""
    step.model.eval()
    with precision(step.device, step.settings):
        raw_bc = step.model(pack(step.train_set, rows).to(step.device))
    return float(step.loss(raw_bc, step.targets[rows].to(step.device))) / len(rows)


@torch.inference_mode()
def _their_loss(model: Any, batch: Any, settings: Settings) -> float:
    model.eval()
    with precision(model.device, settings):
        return float(model(**batch).loss)


def _compared(
    pairs: list[tuple[float, float]], our_tokens: int, counts: list[tuple[int, int]], whole: Tokens
) -> dict[str, Any]:
    """From seconds of the Trainer and of ours in each turn, and tokens without and with padding of the Trainer's batches.

    `padding_ratio_whole_file` would be the ratio if all rows were padded to the longest one.
    """
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    tokens, padded = (sum(column) for column in zip(*counts, strict=True))
    seconds = {"huggingface": [theirs for theirs, _ in pairs], "ours": [ours for _, ours in pairs]}
    return {
        "ratio_huggingface": ratio,
        "padding_ratio": padded / tokens,
        "share_of_padding": ratio / (padded / tokens),
        "padding_ratio_whole_file": int(whole.lengths.max()) / float(whole.lengths.mean()),
        "tokens": {"huggingface": tokens, "huggingface_padded": padded, "ours": our_tokens},
        "tokens_per_second": {name: tokens / len(pairs) / statistics.median(values) for name, values in seconds.items()},
        "seconds": seconds,
    }


def _head(tokens: Tokens, rows: int) -> Tokens:
    """The first rows."""
    rows = min(rows, len(tokens.labels))
    seconds = None if tokens.seconds is None else tokens.seconds[:rows]
    ids = tokens.ids[: tokens.starts[rows]]
    return Tokens(ids, tokens.starts[: rows + 1], tokens.labels[:rows], tokens.truncated, seconds)


def _made_up_task() -> Task:
    """Sequences of 100 bases, whose numbers of tokens differ."""
    with tempfile.TemporaryDirectory() as folder:
        made = synthesize(Path(folder) / "data", bases=SMALLEST_GENOME, species=1, seed=SEED)
        return read_task(Path(made["task"]))


def _model(args: argparse.Namespace, task: Task) -> tuple[ModelConfig, dict[str, Tensor] | None, Tokenizer]:
    """Sizes, weights (None: random ones) and tokenizer. Raises InputError."""
    if args.model is not None:
        if args.like or args.sizes or args.tokenizer:
            raise InputError("--model has sizes and a tokenizer of its own; leave out --like, --sizes and --tokenizer")
        found = load_pretrained(args.model)
        return found.config, found.weights, open_tokenizer(found.tokenizer)
    config = load_config(args.like or "tiny", [f"model.{size}" for size in args.sizes]).model
    if args.tokenizer is None:
        tokenizer = train_bpe(task.splits["train"].sequences, config.vocab_size, MINIMUM_OCCURRENCES)
    else:
        tokenizer = open_tokenizer(args.tokenizer)
    return config.model_copy(update={"vocab_size": tokenizer.get_vocab_size()}), None, tokenizer
