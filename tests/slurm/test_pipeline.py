"""`python -m slurm submit`: what it submits, what it leaves out and what it refuses; then the chain under a real Slurm."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.cli import main
from pretrain.config import load_config
from slurm.__main__ import build_parser
from slurm.pipeline_file import Finetune, Shard, Tokenizer, read_pipeline
from tests.commands import ROOT, python
from tests.slurm.cluster import SlurmCluster, wait_until

HOSTILE = """it's "two" words: #1; $(touch pwned) `touch pwned` & %j"""


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Folders that look like genomes and a benchmark of two tasks."""
    (tmp_path / "genomes").mkdir()
    for task in ("tf/0", "tf/1"):
        (tmp_path / "GUE" / task).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            (tmp_path / "GUE" / task / f"{split}.csv").touch()
    return tmp_path


def write(folder: Path, text: str) -> Path:
    """The pipeline of `inputs`, with these sections instead of or beside its own."""
    path = folder / "pipeline.yaml"
    lines = ["out: out\n", "genomes: genomes\n", "gue: GUE\n", "pretrain: {config: tiny}\n"]
    given = re.findall(r"^(\w+:)", text, re.MULTILINE)
    path.write_text("".join(line for line in lines if line.split()[0] not in given) + text)
    return path


def submit(capfd: pytest.CaptureFixture[str], path: Path, *more: str) -> tuple[int, list[str], str]:
    """Status, lines of stdout and all of stderr."""
    status = main(build_parser(), ["submit", str(path), *more])
    out, err = capfd.readouterr()
    return status, out.splitlines(), err


def dry_run(capfd: pytest.CaptureFixture[str], path: Path) -> dict[str, str]:
    """The commands that would be submitted, by stage."""
    status, lines, err = submit(capfd, path, "--dry-run", "--json")
    assert status == 0, err
    names = json.loads(lines[-1])["submitted"]
    assert len(names) == len(lines) - 1
    return dict(zip(names, lines, strict=False))


def finish(out: Path, *stages: str) -> None:
    """Leave behind what these stages would."""
    files = {
        "tokenizer": ["tokenizer.json"],
        "finalize": ["dataset/manifest.json"],
        "finetune": [],
        "report": ["report/table.md"],
    }
    for stage in stages:
        if stage == "pretrain":
            (out / "run").mkdir(parents=True)
            (out / "run" / "config.yaml").write_text("train: {max_steps: 600, stop_at_step: null}\n")
            (out / "run" / "exit.json").write_text('{"status": 0, "checkpoint_step": 600}\n')
            files[stage] = ["hf/config.json"]
        if stage == "finetune":
            files[stage] = [f"results/tf__{task}/hf/seed-{seed}.json" for task in (0, 1) for seed in (0, 1, 2)]
        for name in files[stage]:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).touch()


def test_a_dry_run_prints_one_chain_and_writes_nothing(inputs, capfd):
    path = write(
        inputs,
        """
tokenizer: {vocab-size: 512}
shard: {array: 4, valid-fraction: 0.1}
finetune: {array: 3, seeds: 2}
sbatch:
  all: {time: 24:00:00, exclusive: true, mem: 4G}
  pretrain: {nodes: 2, gpus-per-node: 8, mem: 0, exclusive: false}
""",
    )
    commands = dry_run(capfd, path)
    assert list(commands) == ["tokenizer", "shard", "finalize", "pretrain", "finetune", "report"]
    out = inputs / "out"
    assert not out.exists()
    assert commands["tokenizer"] == (
        f"sbatch --time=24:00:00 --exclusive --mem=4G --parsable --job-name=tokenizer --comment={out} "
        f"--output={out}/logs/tokenizer-%j.out --open-mode=append "
        f"slurm/data_prep.sbatch tokenizer --out={out}/tokenizer.json --genomes={inputs}/genomes --vocab-size=512"
    )
    assert "--array=0-3 '--dependency=afterok:<tokenizer>' --kill-on-invalid-dep=yes" in commands["shard"]
    assert "shard-%A_%a.out" in commands["shard"] and "--valid-fraction=0.1" in commands["shard"]
    assert commands["finalize"].endswith(f"slurm/data_prep.sbatch finalize {out}/dataset")
    assert commands["pretrain"].startswith(
        f"env RUN_DIR={out}/run DATASET={out}/dataset EXPORT={out}/hf sbatch --time=24:00:00 --mem=0 --nodes=2 "
        "--gpus-per-node=8 --parsable"
    )
    assert commands["pretrain"].endswith("slurm/pretrain.sbatch tiny")
    assert f"gue --model={out}/hf --out={out}/results --data={inputs}/GUE --seeds=2" in commands["finetune"]
    assert "'--dependency=afterok:<finetune>'" in commands["report"]


def test_finished_inputs_shorten_the_chain(inputs, capfd):
    (inputs / "made.json").touch()
    commands = dry_run(capfd, write(inputs, "tokenizer: made.json\n"))
    assert list(commands) == ["shard", "finalize", "pretrain", "finetune", "report"]
    assert f"--tokenizer={inputs}/made.json" in commands["shard"] and "--dependency" not in commands["shard"]

    finish(inputs / "elsewhere", "finalize")
    path = inputs / "pipeline.yaml"
    path.write_text("out: out\ndataset: elsewhere/dataset\npretrain: {config: tiny}\n")
    commands = dry_run(capfd, path)
    assert list(commands) == ["pretrain"] and f"DATASET={inputs}/elsewhere/dataset" in commands["pretrain"]


def test_a_login_node_needs_no_torch(inputs):
    path = write(inputs, "pretrain: {config: tiny, overrides: {train.max_step: 1}}\n")
    code = """
import runpy, sys
sys.modules |= dict.fromkeys(["torch", "numpy", "tokenizers"])
runpy.run_module("slurm", run_name="__main__")
"""
    done = python("-c", code, "submit", path, "--dry-run")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 6, done.stderr
    assert "its configuration is not checked" in done.stderr


def test_overrides_arrive_as_they_are(inputs, capfd):
    path = write(inputs, "")
    overrides = {"train": {"max_steps": 12, "seed": 3}, "data.cache_dir": HOSTILE}
    path.write_text(
        yaml.safe_dump(yaml.safe_load(path.read_text()) | {"pretrain": {"config": "tiny", "overrides": overrides}})
    )
    words = shlex.split(dry_run(capfd, path)["pretrain"])
    config = load_config("tiny", words[words.index("tiny") + 1 :])
    assert (config.train.max_steps, config.train.seed) == (12, 3)
    assert config.data.cache_dir == HOSTILE


def test_what_is_there_is_left_out(inputs, capfd):
    path, out = write(inputs, ""), inputs / "out"
    finish(out, "tokenizer", "finalize")
    assert list(dry_run(capfd, path)) == ["pretrain", "finetune", "report"]
    finish(out, "pretrain")
    (out / "tokenizer.json").unlink()  # nobody needs it any more
    assert list(dry_run(capfd, path)) == ["finetune", "report"]
    finish(out, "finetune", "report")
    assert dry_run(capfd, path) == {}
    assert list(dry_run(capfd, write(inputs, "finetune: {seeds: 4}\n"))) == ["finetune", "report"]
    trained = out / "run" / "checkpoints" / "step-000000600" / "MANIFEST.json"
    trained.parent.mkdir(parents=True)
    trained.touch()  # after the export
    assert list(dry_run(capfd, path)) == ["pretrain", "finetune", "report"]
    trained.unlink()
    assert dry_run(capfd, write(inputs, "")) == {}
    (out / "run" / "exit.json").write_text('{"status": 0, "checkpoint_step": 300}\n')  # of an earlier stop_at_step
    assert list(dry_run(capfd, path)) == ["pretrain", "finetune", "report"]
    status, _, err = submit(capfd, write(inputs, "pretrain: {config: tiny, overrides: {train.stop_at_step: 200}}\n"))
    assert status == 2 and "has gone on to step 300, and train.stop_at_step is 200; use another `out`" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokeniser: {vocab-size: 512}", "unknown key tokeniser, did you mean tokenizer?"),
        ("tokenizer: {vocab_size: 512}", "unknown key tokenizer.vocab_size, did you mean tokenizer.vocab-size?"),
        ("shard: {array: many}", "shard.array: Input should be a valid integer"),
        ("sbatch: {finetuning: {}}", "unknown key sbatch.finetuning, did you mean sbatch.finetune?"),
        ("sbatch: {all: {wrap: touch pwned}}", "sbatch.all: --wrap is set by the pipeline itself"),
        ("sbatch: {all: {'mem=1 --wrap': x}}", "sbatch.all: 'mem=1 --wrap' is not a long option of sbatch"),
        ("sbatch: {all: {arra: 0-3}}", "sbatch.all: --array is set by the pipeline itself"),
        ("sbatch: {pretrain: {comment: mine}}", "sbatch.pretrain: --comment is set by the pipeline itself"),
        ("finetune: {dtype: fp16}", "finetune.dtype: Input should be 'fp32' or 'bf16'"),
        ("finetune: {kernels: apex}", "finetune.kernels: Input should be 'auto', 'triton' or 'torch'"),
        ("finetune: {label: a/b}", "finetune.label: String should match pattern"),
        ("finetune: {batch-size: 0}", "finetune: --batch-size 0: Input should be greater than or equal to 1"),
        ("finetune: {max-steps: 30, warmup-steps: 30}", "warmup-steps is 30 for tf/0, which has only 30 steps"),
        ("dataset: there", "give either genomes or dataset"),
        ("tokenizer: none.json", "none.json: no such file"),
        (
            "pretrain: {config: tiny, overrides: {train.max_step: 1}}",
            "unknown key train.max_step, did you mean train.max_steps?",
        ),
        ("pretrain: {config: tiny, overrides: {run_dir: x}}", "pretrain.overrides: run_dir follows from out"),
        ("pretrain: {config: tini}", "tini: no such file, and not one of the presets"),
        ("out: 'a\\b'", "no control characters or backslashes"),
        ("out: ''", "out: String should have at least 1 character"),
        ("finetune: {seeds: 1, seeds: 2}", "seeds is given twice"),
        ("out: [", "not YAML"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_submitted(inputs, capfd, text, message):
    status, _, err = submit(capfd, write(inputs, text))
    assert status == 2 and message in err and not (inputs / "out").exists(), err
    if "did you mean" in message and "train." not in message:
        assert f"{inputs}/pipeline.yaml: " in err


def test_lists_and_flags_of_fine_tuning_reach_its_command(inputs, capfd):
    text = "finetune: {baselines: [random, kmer], tasks: [tf/0], clean: true, method: lora, protocol: strict}\n"
    command = dry_run(capfd, write(inputs, text))["finetune"]
    assert "--method=lora" in command and "--protocol=strict" in command
    assert command.count("--tasks tf/0 --baselines random kmer --clean") == 1
    status, _, err = submit(capfd, write(inputs, "finetune: {protocol: strict, seeds: 1}\n"), "--dry-run")
    assert status == 2 and "seeds is 1; the strict protocol has at least 3" in err


def test_a_task_without_a_split_is_found_before_its_jobs_are_submitted(inputs, capfd):
    (inputs / "GUE" / "tf" / "1" / "train.csv").unlink()
    status, _, err = submit(capfd, write(inputs, ""), "--dry-run")
    assert status == 2 and "tf/1/train.csv: not found" in err and "finetune.tasks: [tf/0]" in err
    assert dry_run(capfd, write(inputs, "finetune: {tasks: [tf/0]}\n"))


def test_the_example_can_be_read():
    example = read_pipeline(ROOT / "slurm" / "pipeline.yaml")
    assert "--time=24:00:00" in example.sbatch.arguments("pretrain")  # not YAML's 86400, which would be minutes


def test_every_option_of_a_section_is_one_of_the_verb_and_none_is_missing():
    from data_prep.__main__ import build_parser as data_prep
    from finetune.__main__ import build_parser as finetune

    ours = {"out", "genomes", "tokenizer", "task", "num-tasks", "json", "debug", "help"}
    ours |= {"model", "data", "like"}  # gue
    for parser, verb, section in (
        (data_prep(), "tokenizer", Tokenizer),
        (data_prep(), "shard", Shard),
        (finetune([]), "gue", Finetune),
    ):
        (verbs,) = [action for action in parser._actions if action.dest == "==SUPPRESS=="]
        flags = {flag.lstrip("-") for action in verbs.choices[verb]._actions for flag in action.option_strings} - {"h"}
        if verb == "tokenizer":
            flags -= {"compare", "sequence-length"}  # the latter to compare
        keys = {name.replace("_", "-") for name in section.model_fields} - {"array", "file"}
        assert keys == flags - ours, verb


def pipeline(cluster: SlurmCluster, path: Path, **env: str) -> dict[str, Any]:
    """What slurm/pipeline.sh prints, called from elsewhere; `status` and `err` beside it."""
    command = [str(ROOT / "slurm" / "pipeline.sh"), str(path), "--json"]
    done = cluster.run(*command, check=False, PYTHON=sys.executable, **env)
    result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return {**result, "status": done.returncode, "err": done.stderr}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slurm
def test_from_genomes_to_the_report_as_one_chain_and_then_nothing_is_done_again(
    cluster: SlurmCluster, synthetic: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "pipeline.yaml", tmp_path / HOSTILE
    content = {
        "out": HOSTILE,
        "genomes": str(synthetic / "genomes"),
        "gue": str(synthetic / "gue"),
        "tokenizer": {"vocab-size": 512},
        "shard": {"array": 2, "region-bases": 5000, "unit-bases": 50000, "valid-fraction": 0.1, "streams": 8},
        "pretrain": {
            "config": "tiny",
            "overrides": {
                "train": {"max_steps": 12, "log_every": 1},
                "validation.every": 0,
                "data.cache_dir": HOSTILE,
            },
        },
        "finetune": {"array": 2, "seeds": 2, "max-steps": 20, "warmup-steps": 2},
        "sbatch": {"all": {"cpus-per-task": 1, "mem": 0}, "pretrain": {"nodes": 2}},
    }
    path.write_text(yaml.safe_dump(content))
    # From inside a job, say, of which the jobs of the chain must not take themselves for a part.
    inside = {"ARRAY_JOB_ID": "1", "ARRAY_TASK_ID": "7", "NTASKS_PER_NODE": "3", "RESTART_COUNT": "200"}
    first = pipeline(cluster, path, **{f"SLURM_{name}": value for name, value in inside.items()})
    assert first["submitted"] == ["tokenizer", "shard", "finalize", "pretrain", "finetune", "report"], first["err"]
    again = pipeline(cluster, path)
    assert again["submitted"] == [] and again["jobs"]["report"] == first["jobs"]["report"], again["err"]

    def logs() -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted((out / "logs").glob("*")))

    ended = cluster.wait(first["jobs"]["report"], timeout=200)
    assert ended["JobState"] == "COMPLETED", logs()
    assert "synthetic/motif" in (out / "report" / "table.md").read_text()
    assert [json.loads(line)["step"] for line in (out / "run" / "metrics.jsonl").read_text().splitlines()] == [*range(1, 13)]
    config = yaml.safe_load((out / "run" / "config.yaml").read_text())
    assert (config["data"]["cache_dir"], config["run_dir"]) == (HOSTILE, str(out / "run"))
    assert {file.name.split("-")[0] for file in (out / "logs").iterdir()} == set(first["jobs"])
    assert not [*tmp_path.rglob("pwned"), *ROOT.glob("pwned"), *Path.cwd().glob("pwned")]

    before = times(out)
    last = pipeline(cluster, path)
    assert (last["submitted"], last["queued"]) == ([], []), last["err"]
    assert times(out) == before

    path.write_text(yaml.safe_dump(content | {"tokenizer": {"vocab-size": 256}}))
    refused = pipeline(cluster, path)
    assert refused["status"] == 2 and "tokenizer.json was made with vocab-size 512, now 256" in refused["err"]


@pytest.mark.slurm
def test_a_chain_that_breaks_is_taken_up_where_it_broke(cluster: SlurmCluster, inputs: Path) -> None:
    waiting = "sbatch:\n  all: {mem: 0}\n  tokenizer: {begin: now+1hour}\n"
    path = write(inputs, waiting + "  pretrain: {partition: none}\n")
    broken = pipeline(cluster, path)
    assert broken["status"] == 1 and "pretrain: sbatch: error: invalid partition" in broken["err"], broken["err"]

    record = inputs / "out" / "pipeline.json"
    stages = json.loads(record.read_text())["stages"]
    stages["finalize"]["job"] = None  # as if submit had been killed before it knew
    record.write_text(json.dumps({"stages": stages}))
    write(inputs, waiting + "  pretrain: {test-only: true}\n")
    tried = pipeline(cluster, path)
    assert tried["status"] == 1 and re.search("pretrain: sbatch: Job .* to start", tried["err"]), tried["err"]

    write(inputs, waiting)
    mended = pipeline(cluster, path)
    assert (mended["queued"], mended["submitted"]) == (
        ["tokenizer", "shard", "finalize"],
        ["pretrain", "finetune", "report"],
    )
    assert len(cluster.run("squeue", "--noheader").stdout.splitlines()) == 6  # each once
    dependency = cluster.job(mended["jobs"]["pretrain"])["Dependency"]
    assert dependency.startswith(f"afterok:{mended['jobs']['finalize']}")

    write(inputs, "tokenizer: {vocab-size: 512}\nfinetune: {seeds: 5}\n")  # resources may change
    refused = pipeline(cluster, path)
    assert refused["status"] == 2
    assert f"job {mended['jobs']['tokenizer']} was submitted with vocab-size not given, now 512" in refused["err"]
    write(inputs, "finetune: {seeds: 5}\n")
    more = pipeline(cluster, path)
    assert more["submitted"] == [] and "was submitted with seeds 3, now 5" in more["err"]

    cluster.run("scancel", mended["jobs"]["tokenizer"])  # as when it had failed
    wait_until(lambda: not cluster.run("squeue", "--noheader").stdout, 30, "the chain to be gone", cluster.logs)
    assert cluster.job(mended["jobs"]["report"])["JobState"] == "CANCELLED"
    write(inputs, waiting)
    anew = pipeline(cluster, path)
    assert len(anew["submitted"]) == 6
    cluster.run("scancel", *anew["jobs"].values())


@pytest.mark.slurm
def test_an_edit_of_what_is_done_makes_it_longer_or_is_refused_and_then_touches_nothing(
    cluster: SlurmCluster, inputs: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.env[name])
    out, manifest = inputs / "out", inputs / "ready" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text("{}")
    config = Path(shutil.copy(ROOT / "pretrain" / "configs" / "tiny.yaml", inputs / "my.yaml"))
    path = inputs / "pipeline.yaml"

    def edited(overrides: str, sbatch: str = "") -> tuple[int, list[str], str]:
        path.write_text(
            "out: out\ndataset: ready\ngue: GUE\n"
            f"pretrain: {{config: my.yaml, overrides: {{{overrides}}}}}\n"
            f"sbatch: {{all: {{mem: 0, begin: now+1hour}}, pretrain: {{{sbatch}}}}}\n"
        )
        status, lines, err = submit(capfd, path, "--json")
        return status, json.loads(lines[-1])["submitted"] if status == 0 else [], err

    whole = ["pretrain", "finetune", "report"]
    assert edited("train.stop_at_step: 300")[1] == whole
    cluster.run("scancel", "--user=root")
    wait_until(lambda: not cluster.run("squeue", "--noheader").stdout, 30, "the jobs to be gone", cluster.logs)
    finish(out, *whole)
    end = out / "run" / "exit.json"
    end.write_text('{"status": 0, "checkpoint_step": 300}\n')
    before = times(out)
    assert edited("train.stop_at_step: 300, train.log_every: 1")[1] == []

    for overrides, sbatch, message in (
        ("train.stop_at_step: 300, train.max_steps: 900", "", "run was made with train.max_steps 600, now 900; use another"),
        ("train.max_steps: 900", "", "run was made with train.max_steps 600, now 900; use another"),
        ("train.stop_at_step: 600", "partition: none", "invalid partition"),
    ):
        status, _, err = edited(overrides, sbatch)
        assert status in (1, 2) and message in err, err
    config.write_text(config.read_text().replace("learning_rate: 2.0e-3", "learning_rate: 3.0e-3  # more"))
    assert "was made with optimizer.learning_rate 0.002, now 0.003" in edited("train.stop_at_step: 300")[2]
    config.write_text(config.read_text().replace("learning_rate: 3.0e-3", "learning_rate: 2.0e-3"))
    manifest.write_text('{"other": 1}')
    assert "was made with dataset manifest sha256" in edited("train.stop_at_step: 300")[2]
    manifest.write_text("{}")
    after = times(out)
    assert {file for file in after.keys() | before.keys() if after.get(file) != before.get(file)} == {out / "pipeline.json"}

    status, submitted, err = edited("")  # the run goes on, to step 600
    assert submitted == whole, err
    assert sorted(folder.name.split("-")[0] for folder in out.glob("*.before-*")) == [
        "hf.before",
        "report.before",
        "results.before",
    ]
    cluster.run("scancel", "--user=root")
    wait_until(lambda: not cluster.run("squeue", "--noheader").stdout, 30, "the jobs to be gone", cluster.logs)
    shutil.rmtree(out / "run")
    finish(out, "pretrain")
    assert edited("")[1] == ["finetune", "report"]  # there is no result of this model
    cluster.run("scancel", "--user=root")
