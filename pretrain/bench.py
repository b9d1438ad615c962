"""`python -m pretrain bench`: training speed beside what a user would take otherwise, a Hugging Face BERT, in one run.

Steps of the models alternate, so that both meet the same machine, and the median of each is compared. A step is forward,
backward and AdamW on a ready-made batch of full-length sequences (no padding, which is the case that suits Hugging Face
best), with dropout as in training. The two models have the same vocabulary, layers, hidden size, heads and dtype; BERT's
MLP has two matrices where GEGLU has three, so it gets 1.5 times the intermediate size, which makes the matrix FLOPs of a
layer equal. Our model computes the vocabulary's logits at the masked tokens only; BertForMaskedLM at all tokens, as everyone
runs it. The result has both as they are, and also Hugging Face's encoder with its head on the masked tokens only.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from data_prep.cli import InputError, log
from kernels import choice
from kernels.random import PURPOSE_DROPOUT, fork, keep_mask, root_key
from pretrain.config import load_config
from pretrain.engine import DTYPES
from pretrain.flops import training_flops
from pretrain.implementations import choose_alone
from pretrain.masking import FIRST_CONTENT
from pretrain.model import MaskedLanguageModel, ModelConfig, Packed, initialize

MASKED_SHARE = 0.15
WARM_UP = 3  # steps of each model
Step = Callable[[], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("config", nargs="?", default="tiny", metavar="CONFIG", help="a YAML file or preset (default: tiny)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as model.hidden_size=256")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of weights and computation (default: train.dtype)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="sequences a step (default: 32)")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens a sequence (default: 128)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps of each model (default: 20)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: measure and log a summary."""
    for name in ("batch", "length", "steps", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    config = load_config(args.config, args.overrides)
    result = bench(
        config.model,
        dtype=args.dtype or config.train.dtype,
        batch=args.batch,
        length=args.length,
        steps=args.steps,
        threads=args.threads,
    )
    for name, speed in result["tokens_per_second"].items():
        size, flops = result["parameters"][name], result["matrix_flops_per_step"][name]
        log(f"{name:26} {speed:12,.0f} tokens/s   {size:,} parameters   {flops / 1e9:,.2f} matrix GFLOP a step")
    log(
        f"ours / Hugging Face: {result['ratio_huggingface']:.2f} as they are, "
        f"{result['ratio_huggingface_masked_logits']:.2f} with Hugging Face's logits on masked tokens only"
    )
    if result["dropout_generator_share"] is not None:
        log(f"the dropout generator takes {result['dropout_generator_share']:.1%} of our step")
    return result


def bench(
    config: ModelConfig,
    *,
    dtype: str = "fp32",
    batch: int = 32,
    length: int = 128,
    steps: int = 20,
    threads: int | None = None,
) -> dict[str, Any]:
    """Time `steps` steps of each model, alternating, on the GPU if there is one.

    Args:
        dtype: of weights, gradients, AdamW's moments and computation, alike for all models.
        batch, length: sequences a step, tokens a sequence; 15 % of the tokens are masked.
        threads: of torch on a CPU; None leaves its choice.

    Returns:
        `ratio_huggingface` (ours / theirs in tokens/s), the medians it is made of, parameters and matrix FLOPs of each,
        `dropout_generator_share` of our step (None where it is part of other kernels), the setting and the versions; JSON.

    Raises InputError when transformers isn't installed.
    """
    threads_before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return _bench(config, dtype, batch, length, steps)
    finally:
        torch.set_num_threads(threads_before)


def _bench(config: ModelConfig, dtype: str, batch: int, length: int, steps: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    names = choose_alone(config, device, DTYPES[dtype], length, choice.AUTO)
    ids_bs = torch.randint(FIRST_CONTENT, config.vocab_size, (batch, length), device=device)
    masked_bs = torch.rand(batch, length, device=device) < MASKED_SHARE
    ours = MaskedLanguageModel(config)
    initialize(ours, 0, config.initializer_range)
    theirs = _huggingface_model(config, length)
    for model in (ours, theirs):
        model.to(device=device, dtype=DTYPES[dtype]).train()
    run_steps: dict[str, Step] = {
        "ours": _our_step(ours, ids_bs, masked_bs),
        "huggingface": _huggingface_step(theirs, ids_bs, masked_bs),
        "huggingface_masked_logits": _huggingface_masked_step(theirs, ids_bs, masked_bs),
    }
    if set(names.values()) != {"torch"}:
        run_steps["ours_in_plain_pytorch"] = _in_plain_pytorch(run_steps["ours"])
    for step in run_steps.values():
        for _ in range(WARM_UP):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in run_steps}
    for _ in range(steps):
        for name, step in run_steps.items():
            seconds[name].append(_seconds(step, device))
    share = _generator_share(run_steps["ours"], steps, device) if set(names.values()) == {"torch"} else None

    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens, masked = batch * length, int(masked_bs.sum())
    return {
        "ratio_huggingface": median["huggingface"] / median["ours"],
        "ratio_huggingface_masked_logits": median["huggingface_masked_logits"] / median["ours"],
        "tokens_per_second": {name: tokens / value for name, value in median.items()},
        "step_seconds": median,
        "dropout_generator_share": share,
        "parameters": {name: _parameters(ours if name.startswith("ours") else theirs) for name in run_steps},
        "matrix_flops_per_step": {
            # BERT with 1.5 f has 2 d (1.5 f) in its MLP where GEGLU has 3 d f: one formula for all.
            name: training_flops(config, tokens, tokens * length, tokens if name == "huggingface" else masked)
            for name in run_steps
        },
        "kernels": names,
        "model": config.model_dump(),
        "huggingface_intermediate_size": theirs.config.intermediate_size,
        "setting": {
            "dtype": dtype,
            "batch": batch,
            "length": length,
            "masked_tokens": masked,
            "steps": steps,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": importlib.import_module("transformers").__version__,
        },
    }


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _huggingface_model(config: ModelConfig, length: int) -> Any:
    """transformers' BertForMaskedLM with random weights; imported here, so that nothing else needs transformers."""
    try:
        from transformers import AutoModelForMaskedLM, BertConfig
    except ImportError:
        raise InputError(
            "transformers is not installed, and it is what this bench compares with; "
            'install the extra "test": pip install -e ".[test]"'
        ) from None
    settings = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=round(1.5 * config.intermediate_size),
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        max_position_embeddings=max(512, length),
        layer_norm_eps=config.layer_norm_eps,
    )
    return AutoModelForMaskedLM.from_config(settings, attn_implementation="sdpa")


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _our_step(model: MaskedLanguageModel, ids_bs: Tensor, masked_bs: Tensor) -> Step:
    batch, length = ids_bs.shape
    positions = torch.arange(batch * length, device=ids_bs.device)
    packed = Packed(
        ids_t=ids_bs.flatten(),
        cu_seqlens=torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=ids_bs.device),
        max_seqlen=length,
        dropout_keys_t=fork(root_key(0, PURPOSE_DROPOUT), positions),
    )
    index_m = masked_bs.flatten().nonzero().flatten()
    labels_m = packed.ids_t[index_m]
    optimizer = _optimizer(model)

    def step() -> None:
        loss, _ = model(packed, index_m, labels_m)
        (loss / len(index_m)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _in_plain_pytorch(step: Step) -> Step:
    """The same step, with every fused operation computed by its plain twin."""

    def plain() -> None:
        with choice.using(**dict.fromkeys(choice.OPERATIONS, "torch")):
            step()

    return plain


def _huggingface_step(model: Any, ids_bs: Tensor, masked_bs: Tensor) -> Step:
    """As in transformers' examples: labels of -100 where nothing is predicted, an attention mask of ones."""
    labels_bs = ids_bs.masked_fill(~masked_bs, -100)
    attention_mask = torch.ones_like(ids_bs)
    optimizer = _optimizer(model)

    def step() -> None:
        model(input_ids=ids_bs, attention_mask=attention_mask, labels=labels_bs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _huggingface_masked_step(model: Any, ids_bs: Tensor, masked_bs: Tensor) -> Step:
    """The same model with its head on the masked tokens only, which transformers leaves to the user."""
    attention_mask, labels_m = torch.ones_like(ids_bs), ids_bs[masked_bs]
    index_m = masked_bs.flatten().nonzero().flatten()
    optimizer = _optimizer(model)

    def step() -> None:
        states_td = model.bert(input_ids=ids_bs, attention_mask=attention_mask).last_hidden_state.flatten(0, 1)
        torch.nn.functional.cross_entropy(model.cls(states_td[index_m]), labels_m).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seconds(step: Step, device: torch.device) -> float:
    start = _now(device)
    step()
    return _now(device) - start


def _generator_share(step: Step, steps: int, device: torch.device) -> float:
    """Median share of a step that passes in `kernels.random.keep_mask`, over steps of their own."""
    shares = []
    with _timed_generator(device) as spent:
        for _ in range(steps):
            spent[0] = 0.0
            whole = _seconds(step, device)
            shares.append(spent[0] / whole)
    return statistics.median(shares)


@contextmanager
def _timed_generator(device: torch.device) -> Iterator[list[float]]:
    """Adds the seconds spent in `keep_mask` to the one number of the list, in every module that calls it."""
    modules: list[Any] = [importlib.import_module(name) for name in ("kernels.plain.dropout", "kernels.plain.attention")]
    spent = [0.0]

    def timed(*args: Any) -> Tensor:
        start = _now(device)
        mask = keep_mask(*args)
        spent[0] += _now(device) - start
        return mask

    try:
        for module in modules:
            module.keep_mask = timed
        yield spent
    finally:
        for module in modules:
            module.keep_mask = keep_mask
