"""`torchrun recording_worker.py OUT KILL_STEP CONFIG key=value ...`: train, and write down what the model sees.

OUT/<step>-<rank>.json gets a line a sequence: position, shard row, sequence of the shard, and a digest of what the model
sees of it: masked ids, which tokens are predicted and what they were, dropout keys. When KILL_STEP is written rank 0 kills
itself (0: never).
"""

import hashlib
import json
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.cli import leave
from pretrain.config import load_config
from pretrain.loader import MaskedBatch
from pretrain.train import _Run, train


def described(run: _Run, batch: MaskedBatch) -> list[list[Any]]:
    rows, sequences = run.loader.order.places(batch.positions_b)
    starts = batch.packed.cu_seqlens.tolist()
    assert batch.packed.dropout_keys_t is not None
    lines = []
    for (start, end), *place in zip(pairwise(starts), batch.positions_b, rows, sequences, strict=True):
        inside = (batch.index_m >= start) & (batch.index_m < end)
        parts = (batch.packed.ids_t[start:end], batch.packed.dropout_keys_t[start:end])
        parts += (batch.index_m[inside] - start, batch.labels_m[inside])
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
        lines.append([*map(int, place), digest])
    return lines


if __name__ == "__main__":
    out, kill_step, name, *overrides = sys.argv[1:]
    real_step = _Run._train_step

    def recorded_step(run: _Run, batches: list[MaskedBatch], masked: float) -> dict[str, float]:
        step = run.step + 1
        lines = [line for batch in batches for line in described(run, batch)]
        (Path(out) / f"{step}-{run.world.rank}.json").write_text(json.dumps(lines))
        if step == int(kill_step):
            run._wait_for_save()  # all have written, and the step saved last is committed
            if run.world.is_first:
                os.kill(os.getpid(), signal.SIGKILL)
        return real_step(run, batches, masked)

    _Run._train_step = recorded_step  # type: ignore[method-assign]
    train(load_config(name, overrides))
    leave(0)
