"""`plan`: what it says of a run, and what it refuses."""

import argparse
import json

import pytest
import torch

from data_prep.cli import InputError
from kernels import choice
from pretrain import plan_check
from pretrain.config import load_config
from pretrain.flops import MEMORY_GB, PEAK_TFLOPS, memory_of_gpu
from pretrain.plan import add_arguments, disk_bytes, run
from pretrain.plan_fit import Memory, Way
from tests.commands import pretrain, result

PAPER = "dnabert2_117m"
LARGE = [
    PAPER,
    "model.hidden_size=2560",
    "model.num_hidden_layers=32",
    "model.num_attention_heads=20",
    "model.intermediate_size=6912",
]


def plan(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_intermixed_args([*argv]))


def test_the_papers_run():
    found = plan(PAPER)
    json.dumps(found)
    parts = found["parameters"]
    assert parts.pop("total") == sum(parts.values()) == 117_074_176
    run_ = found["run"]
    assert (run_["steps"], run_["tokens"]) == (500_000, 500_000 * 4096 * 128)
    assert run_["epochs"] is None and found["data"]["path"] is None
    assert run_["hours"] * 3600 * 8 * 989.5e12 * 0.40 == pytest.approx(run_["matrix_flops"])
    assert run_["share_of_paper_gpu_days"] == pytest.approx(run_["hours"] * 8 / 24 / 112)
    assert found["disk_bytes"] == disk_bytes(load_config(PAPER))
    assert (
        found["memory"]["accumulation"] == 4 and found["memory"]["fits"] and "128 tokens are assumed" in found["warnings"][0]
    )
    assert list(found["memory"]["by_stage"]) == ["1", "2", "3"]  # bf16 has no stage 0
    assert found["checked_against_a_gpu"] is None


def test_measured_tokens_per_second_say_the_hours():
    run_ = plan(PAPER, "--nodes", "2", "--tokens-per-second-per-gpu", "500000")["run"]
    assert run_["tokens_per_second"] == pytest.approx(8_000_000)
    assert run_["hours"] == pytest.approx(500_000 * 4096 * 128 / 8e6 / 3600)


def test_a_growing_batch_has_fewer_tokens():
    sequences = plan(PAPER, "train.max_steps=100", "train.batch_warmup={start: 8, steps: 10}")["run"]["sequences"]
    first = [8 + (4096 - 8) * step // 10 for step in range(10)]
    assert sequences == sum(first) + 90 * 4096


def test_a_dataset_that_is_here_says_length_and_epochs(tiny_dataset):
    found = plan("tiny", f"data.path={tiny_dataset}")
    manifest = json.loads((tiny_dataset / "manifest.json").read_text())
    assert found["data"]["length"] == manifest["sequence_length"]
    assert found["run"]["epochs"] == pytest.approx(600 * 32 / manifest["splits"]["train"]["sequences"])
    with pytest.raises(InputError, match="--sequence-length"):
        plan("tiny", f"data.path={tiny_dataset}", "--sequence-length", "64")


def test_micro_batches_over_the_global_batch_are_named():
    found = plan(PAPER, "--nodes", "8")
    assert "micro batches will have 64 sequences" in found["warnings"][0]
    assert found["memory"]["micro_batch"] == 64
    assert "96 have nothing to do" in plan(PAPER, "train.global_batch_size=32", "--nodes", "16")["warnings"][0]


def test_what_does_not_fit_ends_with_2_and_says_what_would():
    done = pretrain("plan", *LARGE, "deepspeed.zero_stage=1", "train.micro_batch_size=512", "--nodes", "1", status=2)
    assert "DOES NOT FIT" in done.stderr
    message = done.stderr.splitlines()[-1]
    for remedy in ("train.micro_batch_size=", "train.activation_checkpointing=true", "--nodes "):
        assert remedy in message
    done = pretrain("plan", *LARGE, "deepspeed.zero_stage=3", "--nodes", "16", "--json")
    assert result(done)["memory"]["fits"]


def test_every_way_out_fits_and_the_next_larger_micro_batch_does_not():
    config = load_config(PAPER, ["train.micro_batch_size=4096", "deepspeed.zero_stage=1"])
    memory = Memory(config, dict.fromkeys(choice.OPERATIONS, "triton"), 128, 1, 16e9)
    now = Way(1, 4096, False, 1)
    assert not memory.fits(now)
    ways = memory.ways_out(now)
    assert ways and all(memory.fits(way) for way in ways)
    (smaller,) = [way for way in ways if way.micro_batch < 4096]
    assert not memory.fits(Way(1, smaller.micro_batch + 1, False, 1))
    (more,) = [way for way in ways if way.nodes > 1]
    assert not memory.fits(Way(1, 4096, False, more.nodes - 1))


def test_where_no_single_change_fits_several_are_named():
    # Stage 1 keeps all weights and gradients on every GPU, 10 GB; the other stages can't have such micro batches.
    config = load_config(LARGE[0], [*LARGE[1:], "train.micro_batch_size=4096", "deepspeed.zero_stage=1"])
    memory = Memory(config, dict.fromkeys(choice.OPERATIONS, "triton"), 128, 8, 9e9)
    now = Way(1, 4096, False, 1)
    (way,) = memory.ways_out(now)
    assert memory.fits(way) and way.stage > 1 and way.micro_batch < 4096
    assert f"deepspeed.zero_stage={way.stage} train.micro_batch_size={way.micro_batch}" in way.words(now)
    assert Memory(config, memory.kernels, 128, 8, 1e9).ways_out(now) == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gpu", "Abacus"], "--gpu-memory-gb"),
        (["--gpu", "Abacus", "--gpu-memory-gb", "40"], "train.peak_tflops"),
        (["--mfu", "40"], "at most 1"),
        (["--nodes", "0"], "above 0"),
    ],
)
def test_what_it_can_not_plan_with(flags, message):
    with pytest.raises(InputError, match=message):
        plan(PAPER, *flags)


@pytest.mark.parametrize(
    "name, gigabytes",
    [
        ("NVIDIA H100 80GB HBM3", 80),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A100-SXM4-40GB", 40),
        ("NVIDIA A100 80GB PCIe", 80),
        ("Tesla V100-SXM2-32GB", 32),
        ("NVIDIA GH200 480GB", 96),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_memory_goes_by_the_name_of_a_gpu(name, gigabytes):
    assert memory_of_gpu(name) == gigabytes


def test_every_gpu_with_a_peak_has_a_memory():
    assert all(memory_of_gpu(name) for name in PEAK_TFLOPS) and MEMORY_GB.keys() <= PEAK_TFLOPS.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_check_against():
    with pytest.raises(InputError, match="no GPU"):
        plan(PAPER, "--check")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_on_this_gpu_takes_what_is_planned(stage):
    config = load_config(PAPER, [f"deepspeed.zero_stage={stage}", "train.micro_batch_size=32"])
    found = plan_check.check(config, 128)
    assert 0.95 * found["measured"] < found["planned"] < 1.25 * found["measured"]
