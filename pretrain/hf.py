"""To and from Hugging Face directories, and from run to run: `python -m pretrain export` and `import`.

An exported directory is whole in itself: it carries the modelling code that transformers runs (`hf_modeling.py`), and
its weights have the 142 names of the published checkpoint, so the published code loads them too. Names are not mapped
in either direction: they are our state dict's own. A directory is written under another name, fsynced and renamed, so
that a half of one is never taken for whole.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from data_prep.cli import InputError, dump_json, fsync_directory, log
from data_prep.codec import TextEncoder
from data_prep.dataset import SPECIALS
from data_prep.tokenizing.kmer_tokenizer import OVERLAPPING
from pretrain import checkpoint
from pretrain.deepspeed_files import DeepSpeedCheckpoint, is_deepspeed, read_deepspeed
from pretrain.model import ModelConfig, parameter_count
from pretrain.pretrained import EMBEDDINGS, TIED, Pretrained, Run, expected_shapes, open_run, read_huggingface, read_run

MODELING = "modeling_dnabert2"
AUTO_MAP = {
    "AutoConfig": f"{MODELING}.DNABERT2Config",
    "AutoModel": f"{MODELING}.DNABERT2Model",
    "AutoModelForMaskedLM": f"{MODELING}.DNABERT2ForMaskedLM",
    "AutoModelForSequenceClassification": f"{MODELING}.DNABERT2ForSequenceClassification",
}


def export_run(run_dir: Path, out: Path, step: int | None = None) -> dict[str, Any]:
    """Write the weights of a run's newest whole checkpoint, or of `step`, as the Hugging Face directory `out`.

    `out` gets config.json, model.safetensors (fp32), tokenizer.json, tokenizer_config.json, the modelling code and a
    model card. Equal weights give equal bytes. Raises InputError when the run has no such step or `out` is in use.
    """
    model = read_run(Path(run_dir), step)
    out = Path(out)
    with whole_directory(out) as partial:
        tensors = published_state_dict(model.weights)
        write_files(partial, huggingface_config(model.config), tensors, model.tokenizer.read_bytes(), _model_card(model))
    return {
        "out": str(out),
        "step": model.source["step"],
        "parameters": sum(tensor.numel() for tensor in model.weights.values()),
        "files": sorted(path.name for path in out.iterdir()),
    }


def write_files(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: bytes, model_card: str) -> None:
    """Everything that `from_pretrained` needs, and README.md."""
    (folder / "config.json").write_bytes(dump_json(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (folder / "tokenizer_config.json").write_bytes(dump_json(_tokenizer_config()))
    shutil.copyfile(Path(__file__).with_name("hf_modeling.py"), folder / f"{MODELING}.py")
    (folder / "README.md").write_text(model_card)


def import_directory(
    directory: Path, run_dir: Path, like: Path | None = None, step: int | None = None, fresh_optimizer: bool = False
) -> dict[str, Any]:
    """Make a new run directory whose step 0 has the weights of a Hugging Face directory, a DeepSpeed checkpoint or a run.

    Reads exported directories and the published files, model.safetensors or pytorch_model.bin, and what DeepSpeed's
    `save_checkpoint` writes; it runs no code found there. DeepSpeed's checkpoints and runs bring Adam's moments and its
    count of updates; schedule, data and everything else begin anew.

    Args:
        like: for a DeepSpeed checkpoint, see `read_deepspeed`.
        step: which checkpoint of a run; None: the newest that verifies.
        fresh_optimizer: leave the moments behind.

    Raises InputError naming the file and key that is missing, too much or wrong, or when `run_dir` is in use.
    """
    directory, run_dir = Path(directory), Path(run_dir)
    if not directory.is_dir():
        raise InputError(f"{directory}: not a directory")
    is_run = (directory / "checkpoints").is_dir()
    if step is not None and not is_run:
        raise InputError(f"{directory}: not a run directory (no checkpoints/); leave out --step")
    model: DeepSpeedCheckpoint | Pretrained | Run
    state: dict[str, int]
    if is_run:
        if like is not None:
            raise InputError(f"{directory}: a run directory, which has its architecture; leave out --like")
        model = open_run(directory, step)
        fragments, state = _fragments_of_run(model.checkpoint)
    elif is_deepspeed(directory):
        model = read_deepspeed(directory, like)
        fragments, state = model.fragments, model.optimizer_state
    elif like is not None:
        raise InputError(f"{directory}: not a DeepSpeed checkpoint (no `latest`, no *_model_states.pt); leave out --like")
    elif not (directory / "config.json").is_file():
        raise InputError(f"{directory / 'config.json'}: not found; expected Hugging Face files or a DeepSpeed checkpoint")
    else:
        model = read_huggingface(directory)
        fragments = (checkpoint.Fragment(name, 0, {"weight": t.flatten()}) for name, t in model.weights.items())
        state = {}
    if fresh_optimizer:
        fragments, state = (fragment._replace(tensors={"weight": fragment.tensors["weight"]}) for fragment in fragments), {}
    with whole_directory(run_dir) as partial:
        shutil.copyfile(model.tokenizer, partial / "tokenizer.json")
        checkpoint.save(
            partial,
            step=0,
            life="import",
            fragments=fragments,
            shapes=expected_shapes(model.config),
            model=model.config.model_dump(),
            state=state | {"imported": model.source},
        )
    source = dict(model.source)
    if is_run:
        source["from_step"] = source.pop("step")
    return {"run_dir": str(run_dir), "step": 0, "parameters": parameter_count(model.config)} | state | source


def _fragments_of_run(saved: checkpoint.Checkpoint) -> tuple[Iterator[checkpoint.Fragment], dict[str, int]]:
    """All parameters of a checkpoint, read one after another, and with Adam's moments its count of updates."""
    kinds = checkpoint.KINDS if saved.has_optimizer_state else ("weight",)
    shapes = {name: parameter["shape"] for name, parameter in saved.manifest["parameters"].items()}
    fragments = (
        checkpoint.Fragment(name, 0, {kind: saved.read(name, kind, 0, math.prod(shape)) for kind in kinds})
        for name, shape in shapes.items()
    )
    if len(kinds) == 1:
        log(f"{saved.path}: has no Adam moments (nothing was trained since it was imported); they start at zero")
        return fragments, {}
    return fragments, {"optimizer_step": int(saved.state.get("optimizer_step", 0))}


def published_state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of the published file: ours, and a copy of the tied matrix (safetensors stores no tensor twice)."""
    return weights | {TIED: weights[EMBEDDINGS].clone()}


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """config.json: the keys of the published file, with our modelling code in `auto_map`."""
    return config.model_dump() | {
        "architectures": ["DNABERT2ForMaskedLM"],
        "auto_map": AUTO_MAP,
        "model_type": "dnabert2",
        "alibi_starting_size": 512,  # both for the published code: what it allocates at first
        "max_position_embeddings": 512,
        "classifier_dropout": None,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "pad_token_id": SPECIALS.index("[PAD]"),
        "position_embedding_type": "absolute",  # the published value; either code has ALiBi and nothing else
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _tokenizer_config() -> dict[str, Any]:
    """What AutoTokenizer needs beside tokenizer.json."""
    unknown, first, separator, padding, mask = SPECIALS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "cls_token": first,
        "sep_token": separator,
        "pad_token": padding,
        "mask_token": mask,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }


def _named(source: dict[str, Any]) -> str:
    """What a run was imported from, and what that was imported from."""
    names = {"deepspeed": "a DeepSpeed checkpoint", "huggingface": "Hugging Face files"}
    if source["kind"] != "run":
        return names[source["kind"]]
    earlier = f", started from {_named(source['imported'])}" if "imported" in source else ""
    return f"step {source['step']:,} of another run{earlier}"


def _model_card(model: Pretrained) -> str:
    size, source = sum(tensor.numel() for tensor in model.weights.values()), model.source
    origin = f"Pre-training step {source['step']:,}"
    if "dataset_manifest_sha256" in source:
        origin += f" on the dataset whose manifest.json has sha256 `{source['dataset_manifest_sha256']}`"
    if "imported" in source:
        origin += ", started from " + _named(source["imported"])
    c, encoder, spacing = model.config, TextEncoder(Tokenizer.from_file(str(model.tokenizer))), ""
    if encoder.kind == OVERLAPPING:  # the library can't cut text into pieces that overlap
        k = encoder.k
        spacing = f'\ntext = " ".join(text[i : i + {k}] for i in range(len(text) - {k} + 1))  # k-mers, as in DNABERT'
    return f"""\
---
library_name: transformers
pipeline_tag: fill-mask
tags: [biology, dna, genomics]
---
# A DNABERT-2 of {size:,} parameters

{c.num_hidden_layers} layers, hidden size {c.hidden_size}, {c.num_attention_heads} heads, {c.vocab_size} tokens. ALiBi:
there is no longest input.

{origin}.

```python
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, trust_remote_code=True)  # else it asks
model = AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True).eval()
text = "ACGTAGCATCGGATCTATCTATCGACACTTGGTTATCGATCTACG"{spacing}
batch = tokenizer([text], padding=True, return_tensors="pt")
with torch.no_grad():
    states = model(**batch).last_hidden_state  # [sequences, tokens, {c.hidden_size}], 0 at padding
mask = batch["attention_mask"][..., None]
embedding = (states * mask).sum(1) / mask.sum(1)  # mean over the tokens of each sequence
```

`trust_remote_code=True` runs `{MODELING}.py` from this directory: plain PyTorch, no other package. Sequences are
upper-case A, C, G, T; any other letter becomes `[UNK]`. `AutoModelForMaskedLM` and `AutoModelForSequenceClassification`
load it too; the latter's pooler and classifier start from random weights. The linear layers are named `Wqkv`, `dense`,
`gated_layers` and `wo` (for LoRA: `target_modules=["Wqkv"]`).
"""


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A new directory to fill that becomes `out` when the block ends without an error, and else leaves nothing behind.

    Raises InputError when `out` exists and isn't an empty directory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty directory; name another one, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    try:
        partial.chmod(0o755)  # mkdtemp makes 0700; other users of a cluster read our files
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_dir():
                fsync_directory(path)
            else:
                path.chmod(0o644)  # safetensors writes 0600
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        fsync_directory(partial)
        os.rename(partial, out)  # replaces an empty directory; fails if someone else's has got there first
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_directory(out.parent)
