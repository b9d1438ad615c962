"""A small run and a small directory of published files, for the tests of export and import."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pretrain import checkpoint
from pretrain.model import MaskedLanguageModel, ModelConfig, initialize
from pretrain.pretrained import load_pretrained

SPECIALS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
MERGES = [(a, b) for a in "ACGT" for b in "ACGT"]
CONFIG = ModelConfig(
    vocab_size=25, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, type_vocab_size=2
)
TIED, WORDS = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
PUBLISHED_CONFIG = {  # of zhihan1996/DNABERT-2-117M, less its auto_map
    "_name_or_path": "zhihan1996/DNABERT-2-117M",
    "alibi_starting_size": 512,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": None,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32",
    "transformers_version": "4.28.0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 4096,
}


def write_tokenizer(path, specials=SPECIALS, merges=MERGES):
    words = [*specials, *"ACGT", *(a + b for a, b in merges)]
    vocabulary = {token: number for number, token in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(specials))
    ids = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    tokenizer.save(str(path))


def build_model(seed=0):
    """Weights large enough for every part of the model to matter to the output."""
    model = MaskedLanguageModel(CONFIG)
    initialize(model, seed, 0.3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save_step(run_dir, model, step):
    parameters = dict(model.named_parameters())
    checkpoint.save(
        run_dir,
        step=step,
        life="test",
        fragments=[checkpoint.Fragment(n, 0, {"weight": p.detach().flatten()}) for n, p in parameters.items()],
        shapes={name: tuple(p.shape) for name, p in parameters.items()},
        model=CONFIG.model_dump(),
        state={"loader": {"manifest_sha256": "ab" * 32, "seed": 0, "position": 0}},
    )


def make_run(run_dir, model):
    """A run directory with other weights at step 100 and those of `model` at step 200."""
    run_dir.mkdir(exist_ok=True)
    write_tokenizer(run_dir / "tokenizer.json")
    save_step(run_dir, build_model(seed=1), 100)
    save_step(run_dir, model, 200)


def make_published(directory, model):
    """Laid out as the published directory: pytorch_model.bin with both names of the tied matrix, and an auto_map."""
    directory.mkdir()
    write_tokenizer(directory / "tokenizer.json")
    auto_map = {"AutoConfig": "configuration_bert.BertConfig", "AutoModel": "bert_layers.BertModel"}
    content = PUBLISHED_CONFIG | CONFIG.model_dump() | {"auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(content))
    torch.save(model.state_dict(), directory / "pytorch_model.bin")


def assert_weights(run_dir, model):
    weights = load_pretrained(run_dir).weights
    expected = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name].detach()) for name in expected)
