"""The frame of every tokenizer.json that is written here: that of the published DNABERT-2 tokenizer, key by key.

[UNK] [CLS] [SEP] [PAD] [MASK] = 0 to 4, no normalizer, templates "[CLS] A [SEP]" and "[CLS] A [SEP] B [SEP]"; kinds differ
in pre-tokenizer, model and decoder.
"""

from __future__ import annotations

import json
from typing import Any

from data_prep.dataset import SPECIALS


def tokenizer_json(pre_tokenizer: dict[str, Any], model: dict[str, Any], decoder: dict[str, Any] | None = None) -> bytes:
    """A whole file of these parts, each as the `tokenizers` library spells it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

    def special(token: str, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    def sequence(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    single = [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0)]
    layout = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "special": True, "content": name, **flags} for id, name in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, sequence("B", 1), special("[SEP]", 1)],
            "special_tokens": {
                token: {"id": token, "ids": [SPECIALS.index(token)], "tokens": [token]} for token in ("[CLS]", "[SEP]")
            },
        },
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(layout, indent=2, ensure_ascii=False).encode()
