"""`python dying_worker.py WHERE RANK STEP ARGUMENTS...`: `python -m pretrain ARGUMENTS`, where one rank kills itself.

WHERE is `step` (gradients are ready, the optimizer has not moved), `files` (in the middle of writing its tensors) or
`commit` (everything is written, the rename is not done). Nothing in the project knows of it: the functions that a run
calls at these instants are wrapped from outside.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pretrain.train
from data_prep.cli import main
from pretrain import checkpoint
from pretrain.__main__ import build_parser


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(tensors: Any, path: Path) -> None:
    path.write_bytes(b"half of a header")
    die()


if __name__ == "__main__":
    where, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if os.environ["RANK"] == rank:
        if where == "step":
            real_norm, calls = pretrain.train.gradient_norm_before_step, [0]

            def norm_or_death(engine: Any) -> Any:
                calls[0] += 1
                return die() if calls[0] == step else real_norm(engine)

            pretrain.train.gradient_norm_before_step = norm_or_death
        else:
            real_save = checkpoint.save

            def save_or_death(run_dir: Path, **options: Any) -> Path:
                if options["step"] == step and where == "files":
                    checkpoint.save_file = die_writing
                elif options["step"] == step:
                    checkpoint.os.rename = die  # type: ignore[assignment]
                return real_save(run_dir, **options)

            checkpoint.save = save_or_death
    sys.exit(main(build_parser(), sys.argv[4:]))
