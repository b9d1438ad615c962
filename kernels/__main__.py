"""`python -m kernels check | compile | bench`: right on this device, compiled for any, beside what others would take."""

from __future__ import annotations

import argparse
import sys

from data_prep.cli import add_verb, main
from kernels import bench, check, choice, compile
from kernels.check import DTYPES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = add_verb(verbs, "check", check.run, "Compare every operation with its definition in float64, on this device.")
    verb.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp16", "fp32"], help="default: all three")
    verb.add_argument(
        "--implementation", choices=["triton", "apex", "torch"], default="triton", help="what to check (default: triton)"
    )
    verb.add_argument("--operation", choices=choice.OPERATIONS, help="only this one")

    verb = add_verb(verbs, "compile", compile.run, "Compile every kernel for GPUs that need not be here; registers, spills.")
    verb.add_argument(
        "--arch",
        action="append",
        metavar="ARCH",
        required=True,
        help="sm_80, sm_90, gfx942, ...; may be given several times",
    )
    verb.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="default: bf16")
    verb.add_argument("--operation", choices=choice.OPERATIONS, help="only this one")

    bench.add_arguments(add_verb(verbs, "bench", bench.run, bench.__doc__.partition("\n")[0]))
    return parser


if __name__ == "__main__":
    sys.exit(main(build_parser()))
