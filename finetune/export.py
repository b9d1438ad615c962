"""A fine-tuned model as a Hugging Face directory for `AutoModelForSequenceClassification`, and read back.

Names of tensors are those of the published classification code (`bert.*`, `bert.pooler.dense.*`, `classifier.*`). LoRA's
updates are in the matrices already; a regression's unit is in the classifier's weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from data_prep.cli import InputError, log, one_line
from data_prep.codec import TextEncoder, open_tokenizer
from data_prep.tokenizing.kmer_tokenizer import OVERLAPPING
from finetune.metrics import Objective
from finetune.model import Classifier
from finetune.results import fingerprint
from finetune.sources import CLASSIFIER, Source, is_fine_tuned
from pretrain.hf import huggingface_config, whole_directory, write_files
from pretrain.model import ModelConfig
from pretrain.pretrained import check_tokenizer, parse_config, read_config

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model, read back."""

    config: ModelConfig
    model: Classifier
    objective: Objective  # outputs are in the labels' unit already
    tokenizer: Tokenizer
    about: dict[str, Any]  # the config's `fine_tuned`: task, scores

    @property
    def columns(self) -> list[str]:
        """Of the training files' sequences: one, or two of pairs."""
        return list(self.about.get("columns", ["sequence", "label"]))[:-1]


def export_classifier(model: Classifier, objective: Objective, source: Source, result: Mapping[str, Any], out: Path) -> None:
    """Write `model` as the Hugging Face directory `out`, with a model card of the run's `result`.

    Raises InputError when `out` is in use.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    if objective.classes == 1:
        tensors["classifier.weight"] *= objective.sd
        tensors["classifier.bias"].mul_(objective.sd).add_(objective.mean)
    labels = [f"LABEL_{number}" for number in range(objective.classes)]
    about = {
        key: result[key] for key in ("task", "kind", "metric", "method", "protocol", "seed", "dev", "test", "test_clean")
    }
    about |= {"run_sha256": fingerprint(result), "columns": result["data"]["columns"]}
    config = huggingface_config(source.config) | {
        "architectures": [CLASSIFIER],
        "add_pooling_layer": True,
        "pooling": model.bert.pooling,
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "regression" if objective.classes == 1 else "single_label_classification",
        "fine_tuned": about,
    }
    with whole_directory(out) as partial:
        write_files(partial, config, tensors, _tokenizer_json(source.tokenizer), _model_card(model, source, result))
    log(f"{out}: the fine-tuned model, for `finetune predict` and AutoModelForSequenceClassification")


def _tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The file for transformers: it puts [CLS] and [SEP] where fine-tuning did, and truncates nothing."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    specials = [(token, copy.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    copy.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=specials
    )
    return str(copy.to_str(pretty=True)).encode()


def run_of(directory: Path) -> str | None:
    """The `results.fingerprint` of the run whose model this is; None for anything else."""
    if not is_fine_tuned(directory):
        return None
    about = json.loads((directory / "config.json").read_bytes()).get("fine_tuned")
    return about.get("run_sha256") if isinstance(about, dict) else None


def read_fine_tuned(directory: Path) -> FineTuned:
    """Read what `export_classifier` wrote; no code of the directory is run.

    Raises InputError naming the file and the tensor that is missing, too much, or of another shape.
    """
    path, weights = directory / "config.json", directory / WEIGHTS
    if not directory.is_dir():
        raise InputError(f"{directory}: not a directory")
    if not is_fine_tuned(directory):
        raise InputError(f"{path}: not the config of a fine-tuned model ({CLASSIFIER}); make one: finetune run --export DIR")
    config = parse_config(read_config(path), path)
    content = json.loads(path.read_bytes())
    classes, pooling = len(content.get("id2label", {})), content.get("pooling", "cls")
    if classes < 1 or pooling not in ("cls", "mean"):
        raise InputError(f"{path}: {classes} labels in id2label, pooling {pooling!r}; expected 1 or more, cls or mean")
    check_tokenizer(directory / "tokenizer.json", config)
    model = Classifier(config, classes, pooling)
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights}: can't be read: {one_line(error)}") from None
    _check(weights, {name: tensor.shape for name, tensor in model.state_dict().items()}, tensors)
    model.load_state_dict(tensors)
    tokenizer = open_tokenizer(directory / "tokenizer.json")
    return FineTuned(config, model.eval(), Objective(classes), tokenizer, dict(content.get("fine_tuned", {})))


def _check(path: Path, expected: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    for what, names in {"missing": expected.keys() - found.keys(), "unexpected": found.keys() - expected.keys()}.items():
        if names:
            raise InputError(f"{path}: {what} key {min(names)}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise InputError(f"{path}: {name} is {list(found[name].shape)}, its configuration says {list(shape)}")


def _model_card(model: Classifier, source: Source, result: Mapping[str, Any]) -> str:
    size = sum(parameter.numel() for parameter in model.parameters())
    data, metric, test = result["data"], result["metric"], result["test"]
    rows = ", ".join(f"{data[split]['rows']:,} {split}" for split in ("train", "dev", "test"))
    scores = "\n".join(
        f"| {key} | {result['dev'][key]:.4f} | {test[key]:.4f} |" for key in test if key != "loss" or metric == "loss"
    )
    encoder, spacing = TextEncoder(source.tokenizer), ""
    if encoder.kind == OVERLAPPING:
        k = encoder.k
        spacing = f'\ntext = " ".join(text[i : i + {k}] for i in range(len(text) - {k} + 1))  # k-mers, as in DNABERT'
    kinds = {"full": "All weights were trained.", "lora": "Trained with LoRA; its updates are in the weights."}
    output = (
        "logits.softmax(-1)  # chance of each class" if data["classes"] > 1 else "logits.squeeze(-1)  # in the labels' unit"
    )
    leaks = data["test"]["leaked"]
    collapse = "\n\n**It predicts the same for every test row: this run failed.**" if result["collapsed"] else ""
    warning = f"\n\n{leaks:,} of the test rows have a sequence that train or dev holds too." if leaks else ""
    what = f"{data['classes']} classes" if data["classes"] > 1 else "regression"
    intro = "\n".join(
        [
            f"{what[0].upper() + what[1:]}; {rows} rows. {kinds[result['method']]}",
            f"The training file has sha256 `{data['train']['sha256']}`.",
            f"Protocol `{result['protocol']}`, seed {result['seed']}; the weights of step {result['best_step']} of "
            f"{result['steps']}.",
        ]
    )
    texts, pairs, example = "[text]", "", "sequences.fa"
    if len(data["columns"]) == 3:
        first, second, _ = data["columns"]
        texts, pairs, example = "[text], [text]", f"  # {first}, {second}", f"pairs.csv --columns {first} {second}"
    return f"""\
---
library_name: transformers
pipeline_tag: text-classification
tags: [biology, dna, genomics]
---
# A DNABERT-2 of {size:,} parameters, fine-tuned on {result["task"]}

{intro}

| | dev | test |
|---|--:|--:|
{scores}

One run with one seed, whose weights were chosen on dev: its dev score is optimistic, and another seed gives another
score.{warning}{collapse}

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

DIRECTORY = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(DIRECTORY, trust_remote_code=True).eval()
text = "ACGTAGCATCGGATCTATCTATCGACACTTGGTTATCGATCTACG"{spacing}
with torch.no_grad():
    logits = model(**tokenizer({texts}, return_tensors="pt")).logits{pairs}
{output}
```

Or without transformers: `python -m finetune predict --model DIRECTORY --input {example} --out predictions.csv`.
Sequences are upper-case A, C, G, T, as in the training data; any other letter becomes `[UNK]`.
"""
