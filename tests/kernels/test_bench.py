"""The bench as a smoke test on a CPU, its arithmetic by hand, and who may take part."""

import csv
import dataclasses
import json
import math
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from data_prep.cli import InputError
from kernels import bench
from kernels import bench_contenders as contenders
from kernels.__main__ import build_parser
from kernels.bench_contenders import OURS, Contender, Sizes
from kernels.bench_report import COPY
from tests.commands import python

CPU = torch.device("cpu")
SIZES = Sizes(tokens=128, lengths=(64,), heads=2, head_dim=4)
RAGGED = [37, 1, 128, 90, 300, 130, 70]


def geglu_by(run):
    problem = contenders.geglu(SIZES, 0.0, torch.float32, CPU)
    return dataclasses.replace(problem, contenders={"someone": Contender(lambda: run)})


def test_the_smoke_run_writes_table_picture_and_json(tmp_path):
    done = python("-m", "kernels", "bench", "--rounds", "1", "--json", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "THESE TIMES MEAN NOTHING" in done.stderr
    with (tmp_path / "bench.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    timed = [row for row in rows if row["milliseconds"]]
    assert {row["operation"] for row in timed} == set(contenders.OPERATIONS)
    assert {"SDPA with a bias", "bias tensor", "eager", "plain twin", COPY} <= {row["contender"] for row in timed}
    assert {row["case"] for row in timed if row["operation"] == "attention"} >= {"64", "128", "fine-tuning mix"}
    assert {float(row["dropout_p"]) for row in timed if row["operation"] == "geglu"} == {0.0, 0.1}
    for row in timed:
        assert float(row["gigabytes_per_second"]) > 0 and float(row["fraction_of_copy"]) > 0, row
        assert bool(row["teraflops_per_second"]) == (row["operation"] == "attention")
    assert all(row["torch"] == torch.__version__ and row["python"] and "mean nothing" in row["warning"] for row in rows)
    # Who takes no part is named, with the reason.
    reasons = {(row["operation"], row["contender"]): row["note"] for row in rows if not row["milliseconds"]}
    assert {("attention", name) for name in (OURS, "FlexAttention", "flash-attn")} <= reasons.keys()
    assert all(reasons.values())
    assert matplotlib.image.imread(tmp_path / "bench.png").std() > 0.05
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["rows"]) == len(rows) and Path(result["png"]) == tmp_path / "bench.png"
    assert result["nanoseconds_an_element"]["keep_mask"] > 0


def bench_with(*flags):
    return bench.run(build_parser().parse_args(["bench", *map(str, flags)]))


def test_the_random_generator_alone_writes_no_files(tmp_path):
    result = bench_with("--only", "random", "--rounds", "1", "--out", tmp_path / "none")
    names = {"keep_mask", "keep_mask_philox_10", "keep_mask_philox_7", "dropout", "dropout_torch"}
    assert result["nanoseconds_an_element"].keys() == names and not (tmp_path / "none").exists()


def test_too_few_tokens_are_refused():
    with pytest.raises(InputError, match="at least 128"):
        bench_with("--only", "dropout", "--tokens", "100")


def test_cost_of_attention_by_hand():
    # 5 tokens of 2 heads of 4 numbers of 2 bytes: 80 bytes a tensor, four forward (q k v o), eight backward.
    # A product of an S x 4 and a 4 x S matrix is 2 * S * S * 4 operations a head: S = 2, 3 make 64 and 144.
    assert contenders.attention_cost([2, 3], 2, 4, 2) == (320, 640, 2 * (64 + 144), 5 * (64 + 144))


def test_bytes_of_row_operations_by_hand():
    def cost(problem):
        return problem.cost[:2]

    half = torch.bfloat16
    tensor = 128 * 8 * 2
    # Forward x, residual, y; backward two gradients of y, y, one gradient that serves x and residual, with dropout two.
    assert cost(contenders.layer_norm(SIZES, 0.0, half, CPU)) == (3 * tensor, 4 * tensor)
    assert cost(contenders.layer_norm(SIZES, 0.1, half, CPU)) == (3 * tensor, 5 * tensor)
    assert cost(contenders.geglu(SIZES, 0.1, half, CPU)) == (3 * 4 * tensor, 5 * 4 * tensor)
    assert cost(contenders.cross_entropy(SIZES, half, CPU)) == (32 * 4096 * 2, 2 * 32 * 4096 * 2)
    assert cost(contenders.dropout(SIZES, torch.float32, CPU)) == (4 * tensor, 4 * tensor)


def test_rates_by_hand():
    problem = contenders.attention([2, 3], "small", Sizes(5, (), 2, 4), torch.bfloat16, CPU)
    medians = {
        ("bias tensor", "forward"): (4e-6, 1e-3),
        ("bias tensor", "forward+backward"): (12e-6, 3e-3),
        (COPY, "forward"): (1e-6, 0.0),
        (COPY, "forward+backward"): (3e-6, 0.0),
    }
    rows = {row.way: row for row in bench.results(problem, medians) if row.contender == "bias tensor"}
    assert [row.milliseconds for row in rows.values()] == pytest.approx([0.004, 0.008, 0.012])
    assert [row.gigabytes_per_second for row in rows.values()] == pytest.approx([320 / 4e3, 640 / 8e3, 960 / 12e3])
    assert [row.teraflops_per_second for row in rows.values()] == pytest.approx([416 / 4e6, 1040 / 8e6, 1456 / 12e6])
    assert [row.fraction_of_copy for row in rows.values()] == pytest.approx([0.25, 0.25, 0.25])
    assert list(rows) == ["forward", "backward", "forward+backward"]


@pytest.mark.parametrize("name", ["Liger", "flash-attn"])
def test_who_is_not_installed_is_left_out_with_the_reason(name, monkeypatch):
    for package in ("flash_attn", "liger_kernel"):
        monkeypatch.setitem(sys.modules, package, None)
    if name == "Liger":
        problem = contenders.layer_norm(SIZES, 0.0, torch.float32, CPU)
    else:
        problem = contenders.attention([3, 2], "small", SIZES, torch.bfloat16, CPU)
    assert bench.compare(problem)[name].startswith("not installed")


def test_who_computes_something_else_is_left_out():
    def by_tanh(x):
        gate, up = x.chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") * up,)

    def without_a_gradient_of_up(x):
        gate, up = x.chunk(2, dim=-1)
        return (F.gelu(gate) * up.detach(),)

    def exact(x):
        gate, up = x.chunk(2, dim=-1)
        return (F.gelu(gate) * up,)

    assert "something else" in bench.compare(geglu_by(by_tanh))["someone"]
    assert "something else" in bench.compare(geglu_by(without_a_gradient_of_up))["someone"]
    assert "something else" in bench.compare(geglu_by(lambda x: (exact(x)[0] * math.nan,)))["someone"]
    assert bench.compare(geglu_by(exact)) == {}


def test_dropout_with_another_probability_is_left_out():
    small = dataclasses.replace(SIZES, tokens=2048)
    problem = contenders.dropout(small, torch.float32, CPU)
    other = {"twice": Contender(lambda: lambda x: (F.dropout(x, 0.2),))}
    assert bench.compare(dataclasses.replace(problem, contenders=problem.contenders | other)).keys() >= {"twice"}
    assert "eager" not in bench.compare(problem)


def test_who_fails_on_one_problem_does_not_end_the_run():
    def fails(x):
        raise torch.OutOfMemoryError("no memory for 75 GiB\nand more lines")

    problem = geglu_by(fails)
    rows = list(bench.time_problem(problem, ["someone"], CPU, rounds=1))
    assert [row.note for row in rows if row.contender == "someone"] == ["no memory for 75 GiB"]
    assert {row.contender for row in rows if row.milliseconds} == {COPY}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", [[64, 64], RAGGED])
def test_flex_attention_is_given_the_same_problem(lengths):
    problem = contenders.attention(lengths, "small", SIZES, torch.float32, CPU)
    (qkv,) = problem.leaves
    run = contenders.flex(lengths, SIZES.heads, flex_attention, CPU)
    (found,), (expected,) = run(*qkv.unbind(1)), problem.truth(qkv)
    torch.testing.assert_close(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("lengths", [RAGGED, [128, 256, 128], [5, 600]])
def test_the_document_mask_is_the_one_that_torch_would_make(lengths):
    mask = contenders.document_mask(lengths, CPU)
    expected = create_block_mask(mask.mask_mod, 1, 1, sum(lengths), sum(lengths), device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name
    assert torch.equal(mask.to_dense(), expected.to_dense()) and mask.shape == expected.shape


def test_mixes_are_documented_draws():
    for name, lengths in contenders.mixes(65_536).items():
        assert 65_536 - 128 <= sum(lengths) <= 65_536 and max(lengths) == 128 and min(lengths) >= 8
        short = sum(length < 128 for length in lengths) / len(lengths)
        assert short < 0.03 if name == "pre-training mix" else short > 0.9
    assert contenders.mixes(65_536) == contenders.mixes(65_536)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is seen")
@pytest.mark.parametrize("operation", contenders.OPERATIONS)
def test_on_a_gpu_ours_is_timed_beside_the_others(operation):
    rows = list(bench.bench(operation, Sizes(2048, (64, 300)), torch.bfloat16, torch.device("cuda"), rounds=2))
    assert not [row for row in rows if row.contender == OURS and row.note]
    compiled = "FlexAttention" if operation == "attention" else "torch.compile"
    assert {OURS, COPY, compiled} <= {row.contender for row in rows if row.milliseconds}
