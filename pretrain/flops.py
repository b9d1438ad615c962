"""How much arithmetic a training step is, and what share of the hardware's it uses (MFU): one formula for all reports.

MFU (model FLOPs utilisation; Chowdhery et al., "PaLM", 2022, appendix B) = matrix FLOPs of the interval / (seconds x devices
x peak FLOP/s of a device). As there, recomputed activations don't count. Attention counts over real tokens, within their own
sequence: what an implementation spends on padding is waste, not use.
"""

from __future__ import annotations

import re

import torch

from pretrain.model import ModelConfig

# Dense TFLOP/s (no sparsity) by the name that torch gives the device, without maker and size of memory: in bf16, accumulated
# in fp32 (None: it has no such unit), and in fp32 without tensor cores, because torch multiplies fp32 matrices in TF32 only
# where asked to. Source: vendor data sheets, dense; for GeForce the vendor's architecture white papers.
PEAK_TFLOPS: dict[str, tuple[float | None, float]] = {
    "GB200": (2500, 80),
    "B200": (2250, 75),
    "GH200": (989.5, 67),
    "H200 NVL": (835.5, 60),
    "H200": (989.5, 67),
    "H100 80GB HBM3": (989.5, 67),  # SXM
    "H100 NVL": (835.5, 60),
    "H100 PCIe": (756.5, 51),
    "A100-SXM4": (312, 19.5),
    "A100-PCIE": (312, 19.5),
    "A100 80GB PCIe": (312, 19.5),
    "L40S": (362.05, 91.6),
    "L40": (181.05, 90.5),
    "L4": (121, 30.3),
    "A40": (149.7, 37.4),
    "A30": (165, 10.3),
    "A10": (125, 31.2),
    "GeForce RTX 4090": (165.2, 82.6),
    "GeForce RTX 3090": (71, 35.6),
    "V100-SXM2": (None, 15.7),
    "V100-PCIE": (None, 14),
    "T4": (None, 8.1),
}
# GB of memory by the same names, from the same data sheets, where the name doesn't say it; of two sizes the smaller one.
MEMORY_GB: dict[str, float] = {
    "GB200": 186,
    "B200": 180,
    "GH200": 96,
    "H200 NVL": 141,
    "H200": 141,
    "H100 NVL": 94,
    "H100 PCIe": 80,
    "A100-SXM4": 40,
    "A100-PCIE": 40,
    "L40S": 48,
    "L40": 48,
    "L4": 24,
    "A40": 48,
    "A30": 24,
    "A10": 24,
    "GeForce RTX 4090": 24,
    "GeForce RTX 3090": 24,
    "V100-SXM2": 16,
    "V100-PCIE": 16,
    "T4": 16,
}


def training_flops(config: ModelConfig, tokens: int, squared_lengths: int, logits: int) -> int:
    """Matrix FLOPs of a training step, or of several: all three numbers may be sums.

    In a layer a token costs 4 d^2 (q, k, v, output) + 3 d f (GEGLU) multiply-adds, and a sequence of n tokens 2 n^2 d more
    (scores and their use); in the head d^2 + d v where its logits are computed. Only there the last layer needs its output
    projection and its GEGLU, d^2 + 3 d f. A multiply-add is 2 FLOPs, and the backward pass takes twice the forward pass.
    Norms, activations, softmax and the optimizer are no matrix products and don't count.

    Args:
        config: d hidden_size, f intermediate_size, v vocab_size.
        tokens: with [CLS] and [SEP], without padding.
        squared_lengths: the sum over sequences of the square of their tokens.
        logits: tokens whose logits are computed: the masked ones.
    """
    d, f = config.hidden_size, config.intermediate_size
    layer = tokens * (4 * d * d + 3 * d * f) + 2 * squared_lengths * d
    not_needed = (tokens - logits) * (d * d + 3 * d * f)
    return 6 * (config.num_hidden_layers * layer - not_needed + logits * (d * d + d * config.vocab_size))


def peak_flops(device: torch.device, dtype: str, override_tflops: float | None = None) -> float | None:
    """FLOP/s of one device at best, or None where they aren't known: a CPU, a part of a GPU, a GPU not in the table.

    Args:
        dtype: `bf16` or `fp32`, of the matrix products.
        override_tflops: dense TFLOP/s that the user states; they come first.
    """
    if override_tflops is not None:
        return override_tflops * 1e12
    return peak_of_gpu(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def peak_of_gpu(name: str, dtype: str) -> float | None:
    """The table's FLOP/s for a name such as `NVIDIA A100-SXM4-40GB`, or None; a slice (MIG) has a name of its own."""
    model, without_size = _models(name)
    row = PEAK_TFLOPS.get(model) or PEAK_TFLOPS.get(without_size)
    if row is None:
        return None
    tflops = {"bf16": row[0], "fp32": row[1]}.get(dtype)
    return None if tflops is None else tflops * 1e12


def memory_of_gpu(name: str) -> float | None:
    """GB (10^9 bytes) of memory for a name such as `NVIDIA A100-SXM4-40GB`, or None."""
    model, without_size = _models(name)
    if model in MEMORY_GB or without_size == "GH200":  # whose names say what the CPU has
        return MEMORY_GB[without_size]
    size = re.search(r"[- ](\d+)GB?\b", model)
    return float(size[1]) if size and (model in PEAK_TFLOPS or without_size in PEAK_TFLOPS) else None


def _models(name: str) -> tuple[str, str]:
    """The name without the maker, and also without a size of memory at its end."""
    model = re.sub("^(NVIDIA|Tesla) ", "", name)
    return model, re.sub(r"[- ]\d+GB?( HBM\w+)?$", "", model)


def mfu(flops: float, seconds: float, devices: int, peak: float) -> float:
    """Share of the devices' peak FLOP/s that training used; the definition is above.

    Args:
        flops: `training_flops` of all ranks in the interval.
        seconds: wall time of the interval.
        peak: of one device, `peak_flops`.
    """
    return flops / (seconds * devices * peak)
