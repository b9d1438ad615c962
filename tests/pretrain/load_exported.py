"""What a user does with an exported directory; run by test_hf.py in a process that has transformers and not our packages.

python load_exported.py DIRECTORY INPUTS.pt OUTPUTS.pt
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer


def main(directory: str, inputs: str, outputs: str) -> None:
    batch = torch.load(inputs)
    mask = batch["attention_mask"].bool()
    found = {}

    def load(auto, **options):
        model, info = auto.from_pretrained(directory, trust_remote_code=True, output_loading_info=True, **options)
        return model.eval(), {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys")}

    model, found["masked_lm_keys"] = load(AutoModelForMaskedLM)
    found["tied"] = model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        plain = model(**batch)
        full = model(**batch, output_hidden_states=True, output_attentions=True)
        found["logits"] = plain.logits[mask]
        found["as_tuple"] = torch.equal(model(**batch, return_dict=False)[0], plain.logits)
        found["kept_unasked"] = [plain.hidden_states, plain.attentions]
        found["with_attentions"] = (full.logits[mask] - plain.logits[mask]).abs().max()
        found["hidden_shapes"] = [tuple(x.shape) for x in full.hidden_states]
        found["attention_shapes"] = [tuple(x.shape) for x in full.attentions]
        found["attention_to_padding"] = full.attentions[0].masked_select(~mask[:, None, None, :]).abs().max()
        found["attention_sum"] = full.attentions[0].sum(-1)
        embedded = model.get_input_embeddings()(batch["input_ids"])
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        found["by_embeddings"] = torch.equal(model(inputs_embeds=embedded, **rest).logits, plain.logits)
        bf16 = AutoModelForMaskedLM.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.bfloat16)
        found["bf16_logits"] = bf16.eval()(**batch).logits[mask]
        no_token = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
        found["nothing_but_padding"] = bool(model(**no_token).logits.isfinite().all())
    labels = batch["input_ids"].masked_fill(~mask, -100)
    losses = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        losses[checkpointing] = (loss.detach(), model.bert.embeddings.word_embeddings.weight.grad.norm())
    found["losses"] = losses
    model.save_pretrained(Path(outputs).with_name("saved_again"))

    encoder, found["encoder_keys"] = load(AutoModel)
    with torch.no_grad():
        states = encoder(**batch)
    found["states"], found["padding"] = states.last_hidden_state[mask], states.last_hidden_state[~mask]
    found["pooled_is_cls"] = torch.equal(states.pooler_output, states.last_hidden_state[:, 0])

    classifier, found["classifier_keys"] = load(AutoModelForSequenceClassification, num_labels=3)
    found["classifier_loss"] = classifier(**batch, labels=torch.zeros(len(mask), dtype=torch.long)).loss.detach()
    tuned = Path(outputs).with_name("tuned")
    classifier.save_pretrained(tuned)
    pooler = AutoModel.from_pretrained(tuned, trust_remote_code=True).pooler
    found["pooler_kept"] = torch.equal(pooler.dense.weight, classifier.bert.pooler.dense.weight)

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    found["tokenized"] = dict(tokenizer(["ACGT", "ACGTN"], padding=True))
    found["pair"] = tokenizer("AC", "GT")["token_type_ids"]
    found["special_ids"] = [getattr(tokenizer, f"{name}_token_id") for name in ("unk", "cls", "sep", "pad", "mask")]
    found["ours_in_process"] = sorted({"pretrain", "kernels", "data_prep"} & set(sys.modules))
    torch.save(found, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
