"""A plan as lines to read."""

from __future__ import annotations

from typing import Any

from pretrain.plan_fit import USABLE_SHARE


def report(plan: dict[str, Any]) -> list[str]:
    """Lines of what `pretrain.plan.run` returns."""
    gpus, memory, run, data, parameters = (plan[key] for key in ("gpus", "memory", "run", "data", "parameters"))
    kept, count = memory["activations"], gpus["nodes"] * gpus["per_node"]
    paper_days = f"{run['paper_gpu_days_at_this_peak']:.1f}"
    lines = [
        f"parameters   {parameters['total']:,}: embeddings {parameters['embeddings']:,}, layers {parameters['layers']:,}, "
        f"head {parameters['head']:,}",
        f"GPUs         {gpus['nodes']} x {gpus['per_node']} {gpus['name']}, {gpus['memory_gb']:g} GB, of which "
        f"{gigabytes(memory['usable'])} count (assumed: {USABLE_SHARE:.0%})",
        f"a step       {memory['accumulation']} micro batches of {memory['micro_batch']} sequences of {data['length']} "
        f"tokens a GPU{'' if data['path'] else ' (length assumed: the dataset is not here)'}",
        "state a GPU  stage  weights   fp32 copy  moments  gradients | exact;  buffers  peak of a step | estimate",
    ]
    for stage, held in memory["by_stage"].items():
        mark = "*" if int(stage) == memory["zero_stage"] else " "
        sizes = [gigabytes(held[key]) for key in ("weights", "master_weights", "moments", "gradients")]
        exact = "".join(f"{size:>{width}}" for size, width in zip(sizes, (9, 11, 10, 10), strict=True))
        lines.append(
            f"           {mark} {stage:>4}  {exact}{gigabytes(held['buffers_at_most']):>19}{gigabytes(held['peak']):>15}"
        )
    checkpointing = ", checkpointing" if memory["activation_checkpointing"] else ""
    lines += [
        f"activations  {gigabytes(kept['kept'])} a micro batch, {kept['kept_a_token'] / 1e3:.1f} kB a token{checkpointing}: "
        + ", ".join(f"{part} {gigabytes(kept[part])}" for part in ("embeddings", "layers", "head")),
        f"             the backward pass adds {gigabytes(kept['backward_adds'])} (estimate; torch.compile may take less)",
        f"peak         {gigabytes(memory['peak'])} of {gigabytes(memory['usable'])}: "
        + ("fits" if memory["fits"] else "DOES NOT FIT"),
        f"run          {run['steps']:,} steps, {run['tokens'] / 1e9:,.1f} billion tokens, "
        + ("epochs unknown (the dataset is not here)" if run["epochs"] is None else f"{run['epochs']:,.2f} epochs")
        + f", {run['matrix_flops']:.3g} matrix FLOPs",
        f"time         {run['hours']:,.1f} hours, {run['tokens_per_second']:,.0f} tokens/s on {count} GPUs at "
        f"{run['hours_from']} ({run['mfu']:.1%} of {run['peak_tflops']:g} TFLOP/s); without validation and stops",
        f"cost         {run['gpu_days']:,.1f} GPU-days, {run['share_of_paper_gpu_days']:.3g} of the paper's "
        f"{run['paper_gpu_days']} on RTX 2080 Ti, whose peak would be {paper_days} days of this GPU",
        f"disk         {gigabytes(plan['checkpoint_bytes'])} a checkpoint, {gigabytes(plan['disk_bytes'])} for the run",
    ]
    checked = plan["checked_against_a_gpu"]
    if checked is None:
        lines.append("checked against a GPU: no")
    else:
        lines.append(
            f"checked against a GPU: a step alone on {checked['gpu']} took {gigabytes(checked['measured'])}, planned "
            f"{gigabytes(checked['planned'])} ({checked['planned'] / checked['measured'] - 1:+.1%})"
        )
    return lines + [f"warning: {warning}" for warning in plan["warnings"]]


def gigabytes(size: float) -> str:
    """Bytes as `1.23 GB`, of 10^9."""
    return f"{size / 1e9:.2f} GB"
