"""Every operation against its definition in float64, on the device that is there: `python -m kernels check`.

The truth is the plain PyTorch twin on float64 copies of the same rounded inputs. Errors are the largest difference of an
output, or of a gradient, relative to the largest value of the truth. The twin in the same dtype shows what rounding costs
anyway: an implementation may be off by twice that and a little.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from data_prep.cli import InputError, one_line
from kernels import choice, interpreter
from kernels.choice import Sizes
from kernels.random import fork

# What is allowed on top of twice the twin's own error: sums in another order, softmax weights rounded for tensor cores, and
# a GPU's fast exponential and products of three TF32 parts (fp32), which the interpreter doesn't show.
SLACK = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DROPOUT_P, SITE = 0.1, 9
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One operation on one problem. `make` gives the inputs in float64; `run` calls the operation and returns what has a
    gradient.
    """

    name: str
    operation: str
    dtype: torch.dtype
    make: Callable[[], dict[str, Tensor]]
    run: Callable[..., Outputs]

    def inputs(self) -> dict[str, Tensor]:
        """Fresh inputs in the dtype of the case."""
        return {name: value.to(self.dtype) for name, value in self.make().items()}


@dataclass(frozen=True)
class Error:
    """How far a result is from the truth."""

    of: str
    value: float
    twin: float  # the plain PyTorch twin's in the same dtype
    allowed: float

    @property
    def fits(self) -> bool:
        return self.value <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return f"{self.of} is off by {self.value:.1e}, allowed is {self.allowed:.1e}"


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _keys(tokens: int) -> Tensor:
    return fork(5, torch.arange(tokens))


def attention_case(dtype: torch.dtype, heads: int, dim: int, lengths: Sequence[int], dropout_p: float = 0.0) -> Case:
    """Attention over sequences of these lengths."""
    cu_seqlens, tokens = torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths)

    def run(qkv: Tensor) -> Outputs:
        device = qkv.device
        options: dict[str, Any] = {"dropout_p": dropout_p, "dropout_keys_t": _keys(tokens).to(device), "site": SITE}
        return (kernels.attention(qkv, cu_seqlens.to(device), max(lengths), **(options if dropout_p else {})),)

    name = f"{heads} heads of {dim}, {_short(lengths)}{_dropped(dropout_p)}"
    return Case(name, "attention", dtype, lambda: {"qkv": _normal(tokens, 3, heads, dim, seed=1)}, run)


def layer_norm_case(
    dtype: torch.dtype,
    hidden: int,
    tokens: int,
    residual: bool = True,
    dropout_p: float = 0.0,
    twice: bool = True,
    wide_weights: bool = False,
) -> Case:
    """Dropout, residual sum and LayerNorm. `twice`: both results are used; `wide_weights`: weight and bias are fp32."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Outputs:
        keys_t = _keys(tokens).to(x.device) if dropout_p else None
        if wide_weights:
            weight, bias = weight.to(wide_of(x)), bias.to(wide_of(x))
        out = kernels.dropout_residual_layer_norm(
            x, residual, weight, bias, 1e-12, dropout_p=dropout_p, dropout_keys_t=keys_t, site=SITE
        )
        return out if twice else out[:1]

    def make() -> dict[str, Tensor]:
        inputs = {
            "x": _normal(tokens, hidden, seed=1),
            "weight": 1 + 0.1 * _normal(hidden, seed=2),
            "bias": 0.1 * _normal(hidden, seed=3),
        }
        return inputs | ({"residual": _normal(tokens, hidden, seed=4)} if residual else {})

    name = f"hidden {hidden}, {tokens} tokens{', residual' if residual else ''}{_dropped(dropout_p)}"
    name += f"{'' if twice else ', used once'}{', fp32 weights' if wide_weights else ''}"
    return Case(name, "layer_norm", dtype, make, run)


def geglu_case(dtype: torch.dtype, features: int, tokens: int, dropout_p: float = 0.0) -> Case:
    def run(x: Tensor) -> Outputs:
        keys_t = _keys(tokens).to(x.device) if dropout_p else None
        return (kernels.geglu(x, dropout_p=dropout_p, dropout_keys_t=keys_t, site=SITE),)

    name = f"{features} features, {tokens} tokens{_dropped(dropout_p)}"
    return Case(name, "geglu", dtype, lambda: {"x": 2 * _normal(tokens, 2 * features, seed=1)}, run)


def cross_entropy_case(dtype: torch.dtype, vocabulary: int, rows: int) -> Case:
    """Every fifth row is ignored, and most of the others are right."""
    labels_m = torch.arange(rows) * 7919 % vocabulary
    labels_m[::5] = kernels.IGNORE_INDEX

    def make() -> dict[str, Tensor]:
        logits_mv = _normal(rows, vocabulary, seed=1)
        logits_mv[torch.arange(rows), labels_m.clamp(min=0)] += 3
        return {"logits": 2 * logits_mv}

    def run(logits: Tensor) -> Outputs:
        # Over a copy: an implementation may write its gradient over the logits.
        return kernels.masked_cross_entropy(logits.clone(), labels_m.to(logits.device))

    name = f"vocabulary {vocabulary}, {rows} rows"
    return Case(name, "cross_entropy", dtype, make, run)


def dropout_case(dtype: torch.dtype, width: int, tokens: int) -> Case:
    def run(x: Tensor) -> Outputs:
        return (kernels.dropout(x, DROPOUT_P, _keys(tokens).to(x.device), SITE),)

    return Case(f"width {width}, {tokens} tokens", "dropout", dtype, lambda: {"x": _normal(tokens, width, seed=1)}, run)


def wide_of(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _dropped(p: float) -> str:
    return f", dropout {p}" if p else ""


def _short(lengths: Sequence[int]) -> str:
    return f"lengths {', '.join(map(str, lengths[:6]))}{', ...' if len(lengths) > 6 else ''}"


def trials(operation: str, dtype: torch.dtype, sizes: Sizes) -> list[Case]:
    """The cases that decide at the start of a run whether an implementation is used.

    Few tokens, and between them every kernel that a model of these sizes launches, in training and in evaluation.
    """
    if operation == "attention":
        dim = sizes.hidden // sizes.heads
        # Sequences up to 128 tokens have kernels by the power of two that holds them; longer ones share one.
        lengths = [length for length in (16, 32, 64, 128) if length < 2 * sizes.longest]
        lengths += [200] if sizes.longest > 128 else []
        cases = [attention_case(dtype, sizes.heads, dim, [5, 1, length]) for length in lengths]
        if sizes.attention_dropout:
            cases.append(attention_case(dtype, sizes.heads, dim, [5, 1, lengths[-1]], sizes.attention_dropout))
        return cases
    if operation == "layer_norm":
        return [
            layer_norm_case(dtype, sizes.hidden, 40, dropout_p=DROPOUT_P),
            layer_norm_case(dtype, sizes.hidden, 40),
            layer_norm_case(dtype, sizes.hidden, 40, wide_weights=True),
            layer_norm_case(dtype, sizes.hidden, 40, residual=False, twice=False),
        ]
    if operation == "geglu":
        return [geglu_case(dtype, sizes.intermediate, 40, p) for p in (0.0, DROPOUT_P)]
    if operation == "cross_entropy":
        return [cross_entropy_case(dtype, sizes.vocabulary, 20)]
    return [dropout_case(dtype, sizes.hidden, 40)]


def cases(dtypes: Sequence[torch.dtype], small: bool) -> Iterator[Case]:
    """What the verb checks; `small` for the interpreter, which is slow."""
    for dtype in dtypes:
        if small:
            shapes = [(2, 64, [37, 1, 64, 128, 90], 0.0), (3, 32, [129, 1, 60], 0.0), (1, 64, [70, 1], DROPOUT_P)]
        else:
            shapes = [
                (12, dim, lengths, 0.0)
                for dim in (32, 64, 128)
                for lengths in ([128] * 8, [37, 1, 64, 128, 90], [129, 1, 2, 511, 1024, 300], [4099])
            ]
            shapes += [(12, 64, lengths, DROPOUT_P) for lengths in ([128] * 4, [37, 1, 90], [129, 1, 400])]
            shapes += [(1, 64, [10_240], 0.0)] if dtype != torch.float32 else []
        yield from (attention_case(dtype, *shape) for shape in shapes)
        tokens = 33 if small else 4099
        for hidden in (192, 768) if small else (64, 192, 512, 768, 1024, 2560):
            for p in (0.0, DROPOUT_P):
                yield layer_norm_case(dtype, hidden, tokens, residual=True, dropout_p=p)
        yield layer_norm_case(dtype, 768, tokens, residual=False, twice=False)
        yield layer_norm_case(dtype, 768, tokens, wide_weights=True)
        for features in (200,) if small else (200, 2048, 3072, 4100):
            for p in (0.0, DROPOUT_P):
                yield geglu_case(dtype, features, tokens, p)
        for vocabulary in (4096, 37) if small else (37, 4096, 5000, 65536):
            yield cross_entropy_case(dtype, vocabulary, 33 if small else 515)
        yield dropout_case(dtype, 768, tokens)


def measure(case: Case, device: torch.device) -> list[Error]:
    """Errors of the implementation that is chosen: of each output, and of the gradient of each input."""
    inputs = case.inputs()
    ours = results(case, inputs, device)
    with choice.using(**{case.operation: "torch"}):
        truth = results(case, {name: value.double() for name, value in inputs.items()}, device)
        twin = results(case, inputs, device)
    errors = []
    for name, exact in truth.items():
        exact = exact.double()
        largest = exact.abs().max().clamp(min=1e-30)
        mine, its = (float((result[name].double() - exact).abs().max() / largest) for result in (ours, twin))
        errors.append(Error(name, mine, its, 2 * its + SLACK[case.dtype]))
    return errors


def results(case: Case, inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Outputs of the chosen implementation, and gradients of the inputs for random gradients of the outputs."""
    leaves = {name: value.detach().clone().to(device).requires_grad_() for name, value in inputs.items()}
    outputs = case.run(**leaves)
    smooth = [output for output in outputs if output.is_floating_point()]  # the others are counts
    weights = [_normal(*output.shape, seed=90 + number).to(case.dtype) for number, output in enumerate(smooth)]
    torch.autograd.backward(smooth, [w.to(device, output.dtype) for w, output in zip(weights, smooth, strict=True)])
    results = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    return results | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print one line a case; InputError where nothing can be checked, RuntimeError where something does not fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not interpreter.active():
        raise InputError(
            "no GPU is seen; with TRITON_INTERPRET=1 set, the kernels are checked on the CPU by Triton's interpreter"
        )
    if interpreter.active():
        device = torch.device("cpu")
    asked = [args.operation] if args.operation else list(choice.OPERATIONS)
    wanted = {operation: args.implementation for operation in asked if args.implementation in choice.OPERATIONS[operation]}
    if not wanted:
        raise InputError(f"--operation {args.operation}: {args.implementation} does not compute it")
    rows: list[dict[str, Any]] = []
    failed = 0
    try:
        with choice.using(**wanted):
            print(f"{'operation':14} {'dtype':5} {'case':58} {'worst result':24} {'error':>8} {'PyTorch':>8} {'allowed':>8}")
            for case in cases([DTYPES[name] for name in args.dtype], small=device.type == "cpu"):
                if case.operation not in wanted:
                    continue
                dtype = next(name for name, value in DTYPES.items() if value == case.dtype)
                line = f"{case.operation:14} {dtype:5} {case.name:58}"
                try:
                    errors = measure(case, device)
                except (RuntimeError, ValueError) as error:
                    failed += 1
                    print(f"{line} FAILED: {one_line(error)}", flush=True)
                    rows.append(
                        {"operation": case.operation, "dtype": dtype, "case": case.name, "fits": False, "errors": {}}
                    )
                    continue
                worst = max(errors, key=lambda error: error.value / error.allowed if error.value == error.value else 1e9)
                fits = all(error.fits for error in errors)
                failed += not fits
                line += f" {worst.of:24} {worst.value:8.1e} {worst.twin:8.1e} {worst.allowed:8.1e}"
                print(f"{line}{'' if fits else '  WRONG'}", flush=True)
                rows.append(
                    {"operation": case.operation, "dtype": dtype, "case": case.name, "fits": fits}
                    | {"errors": {error.of: [error.value, error.twin, error.allowed] for error in errors}}
                )
    except choice.Unavailable as error:
        raise InputError(str(error)) from None
    if failed:
        raise RuntimeError(f"{failed} of {len(rows)} cases do not fit; see the lines that say WRONG or FAILED")
    return {
        "cases": rows,
        "device": _device_name(device),
        "torch": torch.__version__,
        "implementation": args.implementation,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreter"
