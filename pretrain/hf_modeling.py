"""DNABERT-2 for Hugging Face transformers, in plain PyTorch: the code that travels with an exported model.

`AutoModel*.from_pretrained(DIRECTORY, trust_remote_code=True)` runs this file, which needs torch and transformers
and nothing else: no compiler, no GPU, no other package. Tried with transformers 4.29, 4.49 and 5.23. Parameter names
are those of the published DNABERT-2 checkpoint; batches are padded, [batch, length], with an `attention_mask`.

Shapes in comments: b sequences, s tokens of the longest one, d hidden, h heads.
"""

# mypy: ignore-errors
import math

import torch
import torch.utils.checkpoint
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput


class DNABERT2Config(PretrainedConfig):
    """Sizes of a DNABERT-2. The keys of the published config.json, so either model code reads the same file.

    `add_pooling_layer` says that the weights include a trained pooler; those of pre-training do not. `pooling` is what the
    pooler sees: the state of [CLS], or the mean over all tokens of a sequence.
    `alibi_starting_size` and `max_position_embeddings` are read by the published code only: there is no longest input.
    """

    model_type = "dnabert2"

    def __init__(
        self,
        vocab_size=4096,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        type_vocab_size=2,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-12,
        initializer_range=0.02,
        hidden_act="gelu",
        classifier_dropout=None,
        alibi_starting_size=512,
        max_position_embeddings=512,
        add_pooling_layer=False,
        pooling="cls",
        pad_token_id=3,
        tie_word_embeddings=True,
        **kwargs,
    ):
        if hidden_act != "gelu":
            raise ValueError(f"hidden_act {hidden_act!r}: DNABERT-2 has the exact gelu")
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling {pooling!r}: expected cls or mean")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.type_vocab_size = type_vocab_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.hidden_act = hidden_act
        self.classifier_dropout = classifier_dropout
        self.alibi_starting_size = alibi_starting_size
        self.max_position_embeddings = max_position_embeddings
        self.add_pooling_layer = add_pooling_layer
        self.pooling = pooling
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)


def alibi_slopes(heads):
    """Slope of each head (Press et al., ICLR 2022); not sorted when `heads` is not a power of two."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    if power < heads:
        slopes += alibi_slopes(2 * power)[0::2][: heads - power]
    return slopes


def attention_bias(attention_mask, heads, length, device, dtype):
    """-slope |i - j|, and the lowest number at padding: [1 or b, h, s, s].

    Not -inf, so that a row without any token gives numbers. Without padding it is not repeated for every sequence.
    """
    position = torch.arange(length, device=device)
    slopes = torch.tensor(alibi_slopes(heads), device=device, dtype=dtype)
    bias = (-slopes[:, None, None] * (position[:, None] - position).abs())[None]
    if attention_mask is None or bool(attention_mask.all()):
        return bias
    return bias.masked_fill(~attention_mask[:, None, None, :], torch.finfo(dtype).min)


class DNABERT2Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids, inputs_embeds):
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        return self.dropout(self.LayerNorm(x + self.token_type_embeddings(token_type_ids)))


class DNABERT2SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, x, bias, output_attentions):
        """[b, s, d], and the softmax weights [b, h, s, s] if asked for; scores are fp32 as in pre-training."""
        b, s, d = x.shape
        dropout_p = self.dropout_p if self.training else 0.0
        qkv = self.Wqkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = qkv.to(bias.dtype).unbind(0)
            if output_attentions:
                weights = ((q @ k.transpose(-1, -2)) / math.sqrt(d // self.heads) + bias).softmax(-1)
                out = F.dropout(weights, dropout_p) @ v
            else:
                weights = None
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)
        return out.transpose(1, 2).reshape(b, s, d).to(qkv.dtype), weights


class DNABERT2SelfOutput(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, attended, x):
        return self.LayerNorm(self.dropout(self.dense(attended)) + x)


class DNABERT2Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self = DNABERT2SelfAttention(config)
        self.output = DNABERT2SelfOutput(config)

    def forward(self, x, bias, output_attentions):
        attended, weights = self.self(x, bias, output_attentions)
        return self.output(attended, x), weights


class DNABERT2FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x):
        gate, up = self.gated_layers(x).chunk(2, dim=-1)
        return self.layernorm(self.wo(self.dropout(F.gelu(gate) * up)) + x)


class DNABERT2Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = DNABERT2Attention(config)
        self.mlp = DNABERT2FeedForward(config)

    def forward(self, x, bias, output_attentions):
        x, weights = self.attention(x, bias, output_attentions)
        return self.mlp(x), weights


class DNABERT2Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList([DNABERT2Layer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False  # set by transformers

    def forward(self, x, bias, output_attentions, output_hidden_states):
        hidden, attentions = [x], []
        for layer in self.layer:
            if self.gradient_checkpointing and self.training:
                x, weights = torch.utils.checkpoint.checkpoint(layer, x, bias, output_attentions, use_reentrant=False)
            else:
                x, weights = layer(x, bias, output_attentions)
            if output_hidden_states:  # kept only when asked for: at evaluation they are most of the memory
                hidden.append(x)
            attentions.append(weights)
        return x, tuple(hidden) if output_hidden_states else None, tuple(attentions) if output_attentions else None


class DNABERT2Pooler(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        return torch.tanh(self.dense(x))


class DNABERT2PreTrainedModel(PreTrainedModel):
    config_class = DNABERT2Config
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DNABERT2Layer"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^cls\."]  # noqa: RUF012  whoever has no such head means to drop it

    def _init_weights(self, module):
        # By torch.nn.init: transformers 5 keeps those functions off tensors that came from the file.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _wants(self, name, value):
        """An output flag: the caller's, else the config's."""
        return getattr(self.config, name, False) if value is None else value


class DNABERT2Model(DNABERT2PreTrainedModel):
    """The encoder.

    `last_hidden_state` is 0 at padding. `pooler_output` is tanh(dense([CLS])) when the weights have a trained pooler;
    those of pre-training have none, and then it is the [CLS] state itself rather than the output of a random layer.
    """

    def __init__(self, config, add_pooling_layer=None):
        super().__init__(config)
        self.embeddings = DNABERT2Embeddings(config)
        self.encoder = DNABERT2Encoder(config)
        with_pooler = config.add_pooling_layer if add_pooling_layer is None else add_pooling_layer
        self.pooler = DNABERT2Pooler(config) if with_pooler else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids=None,
        *,  # the published code and transformers disagree on the order of the next two
        attention_mask=None,
        token_type_ids=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        mask = None if attention_mask is None else attention_mask.to(x.device).bool()
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = attention_bias(mask, self.config.num_attention_heads, x.shape[1], x.device, wide)
        output_attentions = self._wants("output_attentions", output_attentions)
        output_hidden_states = self._wants("output_hidden_states", output_hidden_states)
        x, hidden, attentions = self.encoder(x, bias, output_attentions, output_hidden_states)
        if mask is not None:
            x = x.masked_fill(~mask[:, :, None], 0.0)
        if self.config.pooling == "mean":
            pooled = x.mean(1) if mask is None else x.sum(1) / mask.sum(1, keepdim=True)
        else:
            pooled = x[:, 0]
        if self.pooler is not None:
            pooled = self.pooler(pooled)
        output = BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=pooled, hidden_states=hidden, attentions=attentions
        )
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class DNABERT2Transform(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x):
        return self.LayerNorm(F.gelu(self.dense(x)))


class DNABERT2Predictions(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transform = DNABERT2Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x):
        return self.decoder(self.transform(x))


class DNABERT2Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.predictions = DNABERT2Predictions(config)


class DNABERT2ForMaskedLM(DNABERT2PreTrainedModel):
    """Encoder and masked-language-model head; `labels` [b, s] are -100 where there is nothing to predict."""

    _tied_weights_keys = (
        ["cls.predictions.decoder.weight"]
        if int(transformers.__version__.split(".")[0]) < 5
        else {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    )

    def __init__(self, config):
        super().__init__(config)
        self.bert = DNABERT2Model(config, add_pooling_layer=False)
        self.cls = DNABERT2Head(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value):
        self.cls.predictions.decoder = value

    # Every argument by name: transformers' Trainer takes `**kwargs` for a promise to normalise the loss itself.
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        encoded = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.cls.predictions(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.to(logits.device).flatten(), ignore_index=-100)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class DNABERT2ForSequenceClassification(DNABERT2PreTrainedModel):
    """Encoder, pooler and a linear layer over `num_labels` classes (one label: regression)."""

    def __init__(self, config):
        super().__init__(config)
        config.add_pooling_layer = True  # it is trained from here on, so whoever loads these weights wants it
        self.num_labels = config.num_labels
        self.bert = DNABERT2Model(config)
        dropout_p = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout_p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """`labels`: int64 [b] classes, float [b] for one label, float [b, num_labels] for several at once."""
        encoded = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(encoded.pooler_output))
        loss = None if labels is None else self._loss(logits.float(), labels.to(logits.device))
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return output if self._wants("return_dict", return_dict) else output.to_tuple()

    def _loss(self, logits, labels):
        if self.num_labels == 1:
            return F.mse_loss(logits.squeeze(-1), labels.float().view(-1))
        if labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        return F.cross_entropy(logits, labels.view(-1))
