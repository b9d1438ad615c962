"""What `python -m kernels bench` compares: the problems, who computes them and how, and what each problem must cost.

All get the input in the form that they like best, made before the clock starts: q, k and v apart for attention that does not
take them packed, bias tensors and block masks ready. Those that need padding pad and unpad ragged sequences on the clock, as
a model without padding has to in every layer.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import choice, interpreter
from kernels.choice import Unavailable
from kernels.plain.attention import alibi_slopes
from kernels.plain.cross_entropy import IGNORE_INDEX
from kernels.random import fork

OURS = "ours (Triton)"
OPERATIONS = tuple(choice.OPERATIONS)
EPS, SITE, DROPOUT_P = 1e-12, 9, 0.1
BLOCK = 128  # tokens of a FlexAttention block
Outputs = tuple[Tensor, ...]
Run = Callable[..., Outputs]


@dataclass(frozen=True)
class Contender:
    """Somebody's way to compute a problem."""

    make: Callable[[], Run]  # raises Unavailable; what it returns takes the leaves
    split: bool = False  # takes q, k and v apart


class Cost(NamedTuple):
    """What a problem can't do without: bytes moved, each tensor once, and floating-point operations (0: not counted)."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class Problem:
    """One operation on one input. `truth` is the plain PyTorch twin, on the packed leaves."""

    operation: str
    case: str
    dropout_p: float
    leaves: Outputs
    cost: Cost
    truth: Run
    contenders: dict[str, Contender]
    allowed: float = 5e-5  # how far results may be off, relative to the largest value
    digest: Callable[[Tensor, Tensor], Tensor] | None = None  # of (first leaf, output): compared where masks differ


@dataclass(frozen=True)
class Sizes:
    """How large the problems are: tokens in all, and the lengths of attention that are timed at that many tokens."""

    tokens: int
    lengths: tuple[int, ...]
    heads: int = 12
    head_dim: int = 64

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


FEATURES = 4  # times hidden: GEGLU's outputs, 3072 for 768 as in the model
VOCABULARY = 4096


def problems(operation: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Problem]:
    """What is timed."""
    if operation == "attention":
        for length in sizes.lengths:
            lengths = [length] * max(1, sizes.tokens // length)
            yield attention(lengths, f"{length}", sizes, dtype, device)
        for case, lengths in mixes(sizes.tokens).items():
            yield attention(lengths, case, sizes, dtype, device)
    elif operation == "layer_norm":
        yield from (layer_norm(sizes, p, dtype, device) for p in (0.0, DROPOUT_P))
    elif operation == "geglu":
        yield from (geglu(sizes, p, dtype, device) for p in (0.0, DROPOUT_P))
    elif operation == "cross_entropy":
        yield cross_entropy(sizes, dtype, device)
    else:
        yield dropout(sizes, dtype, device)


def small_problems(operation: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Problem]:
    """What contenders have to get right to be timed, without dropout, as each draws its own, except where it is all.

    Attention is compared in the dtype that is timed, which is all that some take; the others in fp32, which tells the exact
    GELU from the one by tanh.
    """
    small = replace(sizes, tokens=32)
    if operation == "attention":
        yield from (attention(lengths, "small", sizes, dtype, device) for lengths in ([128, 128], [37, 1, 128]))
    elif operation == "layer_norm":
        yield layer_norm(small, 0.0, torch.float32, device)
    elif operation == "geglu":
        yield geglu(small, 0.0, torch.float32, device)
    else:
        yield from problems(operation, small, torch.float32, device)


def mixes(tokens: int) -> dict[str, list[int]]:
    """Lengths of sequences, `tokens` in all or up to 128 fewer, drawn from a fixed seed.

    Pre-training: the loader's sequences have 128 tokens, but for the last one of each stretch of a genome; here one in a
    hundred, of 8 to 127. Fine-tuning: uniform over 8 to 128, about what GUE's tasks come to between them.
    """
    draw = torch.Generator().manual_seed(5)
    most = tokens // 8 + 1
    tails = torch.randint(8, 128, (most,), generator=draw)
    pre_training = torch.where(torch.rand(most, generator=draw) < 0.01, tails, 128)
    fine_tuning = torch.randint(8, 129, (most,), generator=draw)
    fine_tuning[0] = 128
    drawn = {"pre-training mix": pre_training, "fine-tuning mix": fine_tuning}
    return {name: lengths[lengths.cumsum(0) <= tokens].tolist() for name, lengths in drawn.items()}


def load(operation: str, implementation: str, device: torch.device) -> Callable[..., Any]:
    """One of the project's own implementations; Unavailable where it can't run on this device."""
    if implementation != "torch" and device.type == "cpu" and not (implementation == "triton" and interpreter.active()):
        raise Unavailable("it needs a GPU")
    return choice.load(operation, implementation)


def library(name: str, install: str, device: torch.device) -> Any:
    """Somebody else's module of GPU kernels; Unavailable where it isn't installed or there is no GPU."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed ({error}): {install}") from None
    if device.type == "cpu":
        raise Unavailable("it needs a GPU")
    return module


def _liger(device: torch.device) -> Any:
    return library("liger_kernel.transformers.functional", "pip install liger-kernel", device)


def _compiled(run: Run, device: torch.device) -> Run:
    if device.type == "cpu":
        raise Unavailable("compiled code is timed on a GPU only")
    return torch.compile(run, dynamic=False)


def _row_wise(make: Callable[[str], Run], eager: Run, device: torch.device) -> dict[str, Contender]:
    """Who computes the operations that work on rows; `make` takes the name of an implementation."""
    return {
        OURS: Contender(lambda: make("triton")),
        "torch.compile": Contender(lambda: _compiled(eager, device)),
        "eager": Contender(lambda: eager),
        "plain twin": Contender(lambda: make("torch")),
    }


def _normal(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def attention_cost(lengths: Sequence[int], heads: int, head_dim: int, element_size: int) -> Cost:
    """q, k, v, o forward; q, k, v, o and its gradient, and three gradients backward. Two products forward, five backward."""
    elements = sum(lengths) * heads * head_dim * element_size
    product = 2 * sum(length**2 for length in lengths) * heads * head_dim
    return Cost(4 * elements, 8 * elements, 2 * product, 5 * product)


def attention(lengths: list[int], case: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """Bidirectional attention with ALiBi over sequences of these lengths."""
    heads, head_dim, longest = sizes.heads, sizes.head_dim, max(lengths)
    tokens, sequences = sum(lengths), len(lengths)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    ragged = min(lengths) < longest
    lengths_b = cu_seqlens.diff().long()
    starts_b = torch.arange(sequences, device=device) * longest
    slot_t = torch.arange(tokens, device=device) + (starts_b - cu_seqlens[:-1]).repeat_interleave(lengths_b)

    def pad(x_thd: Tensor) -> Tensor:
        if ragged:
            x_thd = x_thd.new_zeros(sequences * longest, heads, head_dim).index_copy(0, slot_t, x_thd)
        return x_thd.view(sequences, longest, heads, head_dim).transpose(1, 2)

    def unpad(x_bhsd: Tensor) -> Tensor:
        x_bshd = x_bhsd.transpose(1, 2)
        return x_bshd.reshape(-1, heads, head_dim).index_select(0, slot_t) if ragged else x_bshd

    def make_bias() -> Tensor:
        """[1, heads, s, s], or one a sequence where keys have to be masked."""
        position = torch.arange(longest, device=device)
        slopes = torch.tensor(alibi_slopes(heads), device=device)
        bias = (-slopes[:, None, None] * (position[:, None] - position).abs()).to(dtype)[None]
        return bias.masked_fill((position >= lengths_b[:, None])[:, None, None, :], -math.inf) if ragged else bias

    def make_sdpa() -> Run:
        bias = make_bias()
        return lambda q, k, v: (unpad(F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=bias)),)

    def make_bias_tensor() -> Run:
        bias_bhss = make_bias().expand(sequences, -1, -1, -1).contiguous()  # the published code has one a sequence

        def run(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
            q, k, v = pad(q), pad(k), pad(v)
            weights = (q @ k.transpose(-1, -2) / math.sqrt(head_dim) + bias_bhss).softmax(-1)
            return (unpad(weights @ v),)

        return run

    def make_flex() -> Run:
        if device.type == "cpu":
            raise Unavailable("it has no backward pass on a CPU")
        from torch.nn.attention.flex_attention import flex_attention

        return flex(lengths, heads, torch.compile(flex_attention, dynamic=False), device)

    def make_flash() -> Run:
        flash = library("flash_attn", "pip install flash-attn", device).flash_attn_varlen_qkvpacked_func
        slopes = torch.tensor(alibi_slopes(heads), device=device)
        return lambda qkv: (flash(qkv, cu_seqlens, longest, alibi_slopes=slopes),)

    def make(implementation: str) -> Run:
        function = load("attention", implementation, device)
        return lambda qkv: (function(qkv, cu_seqlens, longest),)

    qkv = _normal(tokens, 3, heads, head_dim, seed=1, dtype=dtype, device=device)
    contenders = {
        OURS: Contender(lambda: make("triton")),
        "FlexAttention": Contender(make_flex, split=True),
        "flash-attn": Contender(make_flash),
        "SDPA with a bias": Contender(make_sdpa, split=True),
        "bias tensor": Contender(make_bias_tensor, split=True),
    }
    cost = attention_cost(lengths, heads, head_dim, dtype.itemsize)
    return Problem("attention", case, 0.0, (qkv,), cost, make("torch"), contenders, allowed=3e-2)


def flex(lengths: list[int], heads: int, flex_attention: Callable[..., Tensor], device: torch.device) -> Run:
    """FlexAttention with ALiBi: a batch where sequences are equally long, else one row of tokens with a document mask.

    The mask's blocks are written down here: `create_block_mask` would first make all tokens x tokens of it.
    """
    slopes = torch.tensor(alibi_slopes(heads), device=device)

    def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[head] * (query - key).abs()

    if min(lengths) == max(lengths):
        shape, mask = (len(lengths), lengths[0]), None
    else:
        shape, mask = (1, sum(lengths)), document_mask(lengths, device)

    def run(*qkv: Tensor) -> Outputs:
        q, k, v = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in qkv)
        return (flex_attention(q, k, v, score_mod=alibi, block_mask=mask).transpose(1, 2),)

    return run


def document_mask(lengths: Sequence[int], device: torch.device) -> Any:
    """The BlockMask in which tokens see those of their own sequence."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens = sum(lengths)
    of_token = torch.repeat_interleave(torch.tensor(lengths, device=device))

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return of_token[query] == of_token[key]

    first = of_token[::BLOCK]
    last = of_token[torch.arange(len(first), device=device).mul(BLOCK).add(BLOCK - 1).clamp(max=tokens - 1)]
    touched = (first[:, None] <= last) & (last[:, None] >= first)
    # The block at the end is not whole where tokens are no multiple of its size.
    whole = torch.arange(1, len(first) + 1, device=device) * BLOCK <= tokens
    full = (first[:, None] == last) & (last[:, None] == first) & whole & whole[:, None]

    def ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks a row, and their numbers."""
        numbers = dense.int().argsort(dim=-1, descending=True, stable=True)
        return dense.sum(-1, dtype=torch.int32)[None, None], numbers.int()[None, None]

    return BlockMask.from_kv_blocks(
        *ordered(touched & ~full), *ordered(full), BLOCK_SIZE=BLOCK, mask_mod=same, seq_lengths=(tokens, tokens)
    )


def layer_norm(sizes: Sizes, p: float, dtype: torch.dtype, device: torch.device) -> Problem:
    """Dropout, residual sum and LayerNorm; both results are used, as in the model."""
    tokens, hidden = sizes.tokens, sizes.hidden
    keys_t = fork(5, torch.arange(tokens, device=device)) if p else None

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        y = F.layer_norm(F.dropout(x, p) + residual, (hidden,), weight, bias, EPS)
        return y, y

    def make_liger() -> Run:
        normalize = _liger(device).liger_layer_norm

        def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
            y = normalize(F.dropout(x, p) + residual, weight, bias, EPS)
            return y, y

        return run

    def make(implementation: str) -> Run:
        function = load("layer_norm", implementation, device)
        return lambda *leaves: function(*leaves, EPS, dropout_p=p, dropout_keys_t=keys_t, site=SITE)

    x, residual = (_normal(tokens, hidden, seed=seed, dtype=dtype, device=device) for seed in (1, 2))
    weight, bias = (_normal(hidden, seed=seed, dtype=dtype, device=device) for seed in (3, 4))
    contenders = _row_wise(make, eager, device)
    contenders |= {"Liger": Contender(make_liger), "apex": Contender(lambda: make("apex"))}
    size = x.numel() * x.element_size()  # x, residual, y; the two gradients of y, y, and those of x and of the residual
    cost = Cost(3 * size, (5 if p else 4) * size)
    return Problem("layer_norm", f"{tokens} x {hidden}", p, (x, residual, weight, bias), cost, make("torch"), contenders)


def geglu(sizes: Sizes, p: float, dtype: torch.dtype, device: torch.device) -> Problem:
    """GEGLU with its dropout."""
    tokens, features = sizes.tokens, FEATURES * sizes.hidden
    keys_t = fork(5, torch.arange(tokens, device=device)) if p else None

    def eager(x: Tensor) -> Outputs:
        gate, up = x.chunk(2, dim=-1)
        return (F.dropout(F.gelu(gate) * up, p),)

    def make_liger() -> Run:
        multiply = _liger(device).liger_geglu
        return lambda x: (F.dropout(multiply(*x.chunk(2, dim=-1)), p),)

    def make(implementation: str) -> Run:
        function = load("geglu", implementation, device)
        return lambda x: (function(x, dropout_p=p, dropout_keys_t=keys_t, site=SITE),)

    x = _normal(tokens, 2 * features, seed=1, dtype=dtype, device=device)
    contenders = _row_wise(make, eager, device) | {"Liger": Contender(make_liger)}
    size = tokens * features * x.element_size()  # the input is two; backward also its gradient and the output's
    return Problem("geglu", f"{tokens} x {features}", p, (x,), Cost(3 * size, 5 * size), make("torch"), contenders)


def cross_entropy(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """Sum of the cross entropy over rows, a quarter as many as tokens; every fifth is ignored."""
    rows = max(1, sizes.tokens // 4)
    labels_m = torch.arange(rows, device=device) * 7919 % VOCABULARY
    labels_m[::5] = IGNORE_INDEX

    def eager(logits: Tensor) -> Outputs:
        return (F.cross_entropy(logits, labels_m, ignore_index=IGNORE_INDEX, reduction="sum"),)

    def make_liger() -> Run:
        function = _liger(device).liger_cross_entropy
        return lambda logits: (function(logits, labels_m, ignore_index=IGNORE_INDEX, reduction="sum"),)

    def make(implementation: str) -> Run:
        function = load("cross_entropy", implementation, device)
        return lambda logits: function(logits, labels_m)[:1]

    logits = _normal(rows, VOCABULARY, seed=1, dtype=dtype, device=device)
    contenders = _row_wise(make, eager, device) | {"Liger": Contender(make_liger)}
    size = logits.numel() * logits.element_size()
    cost = Cost(size, 2 * size)
    return Problem("cross_entropy", f"{rows} x {VOCABULARY}", 0.0, (logits,), cost, make("torch"), contenders)


def dropout(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """Dropout alone. Compared are the part that is dropped and the factor of the rest."""
    tokens, hidden = sizes.tokens, sizes.hidden
    keys_t = fork(5, torch.arange(tokens, device=device))

    def make(implementation: str) -> Run:
        function = load("dropout", implementation, device)
        return lambda x: (function(x, DROPOUT_P, keys_t, SITE),)

    def eager(x: Tensor) -> Outputs:
        return (F.dropout(x, DROPOUT_P),)

    def digest(x: Tensor, y: Tensor) -> Tensor:
        factors = (y / x)[y != 0].double()
        return torch.stack([1 - len(factors) / y.new_tensor(y.numel(), dtype=torch.float64), factors.min(), factors.max()])

    x = _normal(tokens, hidden, seed=1, dtype=dtype, device=device)
    contenders = _row_wise(make, eager, device)
    size = x.numel() * x.element_size()
    cost = Cost(2 * size, 2 * size)
    return Problem("dropout", f"{tokens} x {hidden}", DROPOUT_P, (x,), cost, make("torch"), contenders, 3e-2, digest)
