"""`python -m kernels bench`."""

from __future__ import annotations

import argparse
import sys

from data_prep.cli import add_verb, main
from kernels.bench import run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels", description="The fused operations of the model.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    bench = add_verb(verbs, "bench", run, "Cost of the random generator beside Philox and torch's dropout, on the CPU.")
    bench.add_argument("--tokens", type=int, default=2048, help="rows (default 2048)")
    bench.add_argument("--width", type=int, default=768, help="elements a row (default 768)")
    bench.add_argument("--rounds", type=int, default=20, help="measurements of each way (default 20)")
    bench.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main(build_parser()))
