"""Import of raw DeepSpeed checkpoints: every bit of them at all stages, what is refused, and that no code is run."""

import json
import math
import os
import shutil

import pytest
import torch

from data_prep.cli import InputError
from pretrain import checkpoint
from pretrain.hf import import_directory
from tests.commands import python
from tests.pretrain.deepspeed_worker import CASES
from tests.pretrain.directories import CONFIG, TIED, WORDS, build_model, save_step, write_tokenizer

MODEL = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What the worker saved, a folder for each case, made by two ranks."""
    out = tmp_path_factory.mktemp("saved")
    done = python("tests/pretrain/deepspeed_worker.py", out, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    out = tmp_path_factory.mktemp("like")
    (out / "config.json").write_text(CONFIG.model_dump_json())
    write_tokenizer(out / "tokenizer.json")
    return out


@pytest.fixture
def theirs(saved, tmp_path):
    """A copy of one case to spoil."""

    def copy(case="2"):
        shutil.copytree(saved / case / "theirs", tmp_path / "theirs")
        return tmp_path / "theirs"

    return copy


def rank_file(rank):
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def edit(path, change):
    """Change the content of a file that `torch.save` wrote."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def whole(found, name, kind):
    return found.read(name, kind, 0, math.prod(found.manifest["parameters"][name]["shape"]))


def assert_same(found, ours, kinds=checkpoint.KINDS):
    assert found.manifest["parameters"].keys() == ours.manifest["parameters"].keys()
    for name in ours.manifest["parameters"]:
        for kind in kinds:
            assert torch.equal(whole(found, name, kind), whole(ours, name, kind)), (name, kind)


def ours_of(saved, case):
    return checkpoint.newest(saved / case / "ours")


@pytest.mark.parametrize("case", CASES)
def test_weights_and_moments_of_every_layout_are_taken_bit_for_bit(saved, like, tmp_path, case):
    theirs = saved / case / "theirs"
    result = import_directory(theirs, tmp_path / "run", like)
    ours, found = ours_of(saved, case.removesuffix("-round-robin")), checkpoint.newest(tmp_path / "run")
    assert_same(found, ours)
    assert found.step == 0 and found.state["optimizer_step"] == ours.state["optimizer_step"] >= 2
    about = {"kind": "deepspeed", "path": str(theirs), "tag": "global_step2"}
    assert found.state["imported"] == about | {"zero_stage": int(case[0]), "ranks": 2, "global_steps": 2}
    assert found.manifest["model"] == CONFIG.model_dump() and result["parameters"] == 9289
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (like / "tokenizer.json").read_bytes()


def test_moments_are_not_all_zero(saved):
    assert all(whole(ours_of(saved, "0"), WORDS, kind).abs().sum() > 0 for kind in ("exp_avg", "exp_avg_sq"))


def test_the_folder_of_a_tag_and_a_config_beside_it_do(theirs, like, tmp_path):
    root = theirs("1")
    (root / "latest").unlink()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(like / name, root / name)
    assert import_directory(root / "global_step2", tmp_path / "run")["tag"] == "global_step2"


def test_a_run_says_the_architecture_too(theirs, like, tmp_path):
    save_step(tmp_path / "other", build_model(), 5)
    shutil.copyfile(like / "tokenizer.json", tmp_path / "other/tokenizer.json")
    assert import_directory(theirs(), tmp_path / "run", tmp_path / "other")["zero_stage"] == 2


def test_names_under_a_wrapper_are_ours(theirs, saved, like, tmp_path):
    def wrap(content):
        content["param_shapes"] = [{f"module.{n}": s for n, s in group.items()} for group in content["param_shapes"]]

    root = theirs("2")
    edit(root / "global_step2" / MODEL, wrap)
    import_directory(root, tmp_path / "run", like)
    assert_same(checkpoint.newest(tmp_path / "run"), ours_of(saved, "2"))


def forget_optimizer(content):
    content["optimizer"] = None


def permute_optimizer(content):
    content["optimizer"]["param_groups"][0]["params"].reverse()


@pytest.mark.parametrize("change", [forget_optimizer, permute_optimizer])
def test_moments_that_are_missing_or_cannot_be_told_apart_are_left_out(theirs, saved, like, tmp_path, capsys, change):
    root = theirs("0")
    edit(root / "global_step2" / MODEL, change)
    assert "optimizer_step" not in import_directory(root, tmp_path / "run", like)
    found = checkpoint.newest(tmp_path / "run")
    assert_same(found, ours_of(saved, "0"), ("weight",))
    assert not found.has_optimizer_state and "no Adam moments" in capsys.readouterr().err


class Harmful:
    """Unpickled without care, it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch '{self.path}'",))


@pytest.mark.parametrize("name", [MODEL, rank_file(1)])
def test_a_file_with_a_foreign_class_is_refused_and_runs_nothing(theirs, like, tmp_path, name):
    root = theirs()
    path = root / "global_step2" / name
    edit(path, lambda content: content.update(note=Harmful(tmp_path / "harm")))
    with pytest.raises(InputError, match=rf"{name}: refused: it holds posix.system, .*without client_state") as error:
        import_directory(root, tmp_path / "run", like)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists() and not (tmp_path / "run").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "harm").exists()  # the file really was harmful


@pytest.mark.parametrize("tag", ["../elsewhere", "/", "..", "", "a/b", "global_step3"])
def test_latest_names_a_folder_beside_it(theirs, like, tmp_path, tag):
    root = theirs()
    shutil.copytree(root / "global_step2", tmp_path / "elsewhere")
    (root / "latest").write_text(tag)
    with pytest.raises(InputError, match=r"latest: .*folder beside it"):
        import_directory(root, tmp_path / "run", like)


def edit_file(name, change):
    return lambda folder: edit(folder / name, change)


def untie(content):
    group = content["param_shapes"][0]
    group[TIED] = group[WORDS]


def shorten(content):
    flats = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    flats[1] = flats[1][:-1].clone()


def spoil_moment(content):
    content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"][7] = math.inf


def other_step(content):
    for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"] += 1


BAD = {
    "a rank is missing": (lambda folder: (folder / rank_file(1)).unlink(), rf"{rank_file(1)}: not found"),
    "the first rank is missing": (lambda folder: (folder / rank_file(0)).unlink(), rf"{rank_file(0)}: not found"),
    "no rank": (lambda folder: [path.unlink() for path in folder.glob("zero*")], r"global_step2: no zero_pp_rank_\*"),
    "no names": (lambda folder: (folder / MODEL).unlink(), rf"global_step2: no {MODEL}"),
    "files of another run": (
        lambda folder: shutil.copyfile(folder / rank_file(0), folder / f"bf16_{rank_file(0)}"),
        r"global_step2: saves of two runs mixed: both bf16_zero\S+ and zero\S+$",
    ),
    "a truncated file": (
        lambda folder: os.truncate(folder / rank_file(1), 5000),
        rf"{rank_file(1)}: can't be read as a PyTorch file",
    ),
    "another content": (
        lambda folder: torch.save([torch.zeros(2)], folder / MODEL),
        rf"{MODEL}: not laid out as by deepspeed 0.19 \(TypeError: .*; load and save it with that version",
    ),
    "a missing key": (
        edit_file(MODEL, lambda content: content["param_shapes"][1].popitem()),
        rf"{MODEL}: missing key cls.predictions.decoder.bias$",
    ),
    "an untied decoder": (edit_file(MODEL, untie), rf"{TIED} and {WORDS} were trained apart"),
    "model parallelism": (edit_file(MODEL, lambda content: content.update(mp_world_size=2)), r"under model parallelism"),
    "a short buffer": (edit_file(rank_file(1), shorten), r"1 elements of cls.predictions.decoder.bias are missing"),
    "not finite": (edit_file(rank_file(1), spoil_moment), r"exp_avg of \S+ holds a value that is not a number"),
    "another save": (edit_file(rank_file(1), other_step), r"Adam has counted \[2, 3\] updates"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named_and_leave_nothing(theirs, like, tmp_path, what):
    spoil, message = BAD[what]
    root = theirs("2")
    spoil(root / "global_step2")
    with pytest.raises(InputError, match=message) as error:
        import_directory(root, tmp_path / "run", like)
    assert "\n" not in str(error.value) and sorted(os.listdir(tmp_path)) == ["theirs"]


def test_an_untied_decoder_is_refused_at_stage_0(theirs, like, tmp_path):
    root = theirs("0")
    edit(root / "global_step2" / MODEL, lambda content: content["module"].update({TIED: torch.zeros(25, 24)}))
    with pytest.raises(InputError, match=f"{TIED} differs from {WORDS}"):
        import_directory(root, tmp_path / "run", like)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 1, "unexpected key bert.encoder.layer.1.attention.output.LayerNorm.bias"),
        ("intermediate_size", 24, r"bert.encoder.layer.0.mlp.gated_layers.weight has shape \[40, 24\], .* \[48, 24\]"),
    ],
)
def test_the_checkpoint_of_another_model_is_refused(theirs, like, tmp_path, key, value, message):
    other = shutil.copytree(like, tmp_path / "like")
    (other / "config.json").write_text(json.dumps(CONFIG.model_dump() | {key: value}))
    with pytest.raises(InputError, match=message):
        import_directory(theirs(), tmp_path / "run", other)


def test_the_architecture_has_to_be_said(theirs, like, tmp_path):
    with pytest.raises(InputError, match=r"no configuration and no tokenizer; .*--like"):
        import_directory(theirs(), tmp_path / "run")
    with pytest.raises(InputError, match="neither a run directory"):
        import_directory(tmp_path / "theirs", tmp_path / "run", tmp_path)
    with pytest.raises(InputError, match="leave out --like"):
        import_directory(like, tmp_path / "run", like)
