"""The names that Hugging Face uses: one table for each model family that we share.

`models.huggingface` reads the tables in both directions. In the names of parameters and tensors
`*` is the number of a block. Parameters of one tensor are joined along its last axis, in order.
"""

import dataclasses
from typing import Any, NamedTuple

from models.config import DecoderConfig, EncoderConfig
from models.presets import BERT, LLAMA, QWEN3


class Family(NamedTuple):
    """A model family of `transformers` in terms of our configs and parameters."""

    base: DecoderConfig | EncoderConfig  # fixed by the family; defaults of absent keys
    keys: dict[str, str]  # field of our config -> key of theirs
    fixed: dict[str, Any]  # key of theirs -> the one value that we support
    tensors: dict[str, str]  # parameter -> tensor
    heads: dict[str, dict[str, str]]  # architecture -> tensors of its head
    prefix: str = ""  # of tensor names; some files leave it out
    ignored: tuple[str, ...] = ()  # patterns of tensors that are not read
    transposed: bool = True  # theirs are [out, in], as in nn.Linear; ours are [in, out]


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/scale": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}


def _linear(ours: str, theirs: str) -> dict[str, str]:
    return {ours: f"{theirs}.weight", f"{ours}_bias": f"{theirs}.bias"}


_GPT2 = Family(
    base=DecoderConfig(bias=True),
    keys={
        "vocab_size": "vocab_size",
        "context": "n_positions",
        "width": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "ffn_width": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "attention_layer_scale": "scale_attn_by_inverse_layer_idx",
    },
    fixed={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    tensors={
        "tokens/embedding": "transformer.wte.weight",
        "positions/embedding": "transformer.wpe.weight",
        **_norm("blocks/*/attention_norm", "transformer.h.*.ln_1"),
        **_linear("blocks/*/attention/query", "transformer.h.*.attn.c_attn"),
        **_linear("blocks/*/attention/key", "transformer.h.*.attn.c_attn"),
        **_linear("blocks/*/attention/value", "transformer.h.*.attn.c_attn"),
        **_linear("blocks/*/attention/out", "transformer.h.*.attn.c_proj"),
        **_norm("blocks/*/mlp_norm", "transformer.h.*.ln_2"),
        **_linear("blocks/*/mlp/up", "transformer.h.*.mlp.c_fc"),
        **_linear("blocks/*/mlp/down", "transformer.h.*.mlp.c_proj"),
        **_norm("norm", "transformer.ln_f"),
    },
    heads={"GPT2LMHeadModel": {}},
    prefix="transformer.",
    ignored=("*.attn.bias", "*.attn.masked_bias", "*lm_head.weight"),
    transposed=False,  # its Conv1D is [in, out]
)

_LLAMA = Family(
    base=dataclasses.replace(LLAMA["llama2-7b"], ffn_width=0),
    keys={
        "vocab_size": "vocab_size",
        "context": "max_position_embeddings",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn_width": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "tied": "tie_word_embeddings",
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    tensors={
        "tokens/embedding": "model.embed_tokens.weight",
        "blocks/*/attention_norm/scale": "model.layers.*.input_layernorm.weight",
        "blocks/*/attention/query": "model.layers.*.self_attn.q_proj.weight",
        "blocks/*/attention/key": "model.layers.*.self_attn.k_proj.weight",
        "blocks/*/attention/value": "model.layers.*.self_attn.v_proj.weight",
        "blocks/*/attention/out": "model.layers.*.self_attn.o_proj.weight",
        "blocks/*/mlp_norm/scale": "model.layers.*.post_attention_layernorm.weight",
        "blocks/*/mlp/gate": "model.layers.*.mlp.gate_proj.weight",
        "blocks/*/mlp/up": "model.layers.*.mlp.up_proj.weight",
        "blocks/*/mlp/down": "model.layers.*.mlp.down_proj.weight",
        "norm/scale": "model.norm.weight",
        "head/embedding": "lm_head.weight",
    },
    heads={"LlamaForCausalLM": {}},
    ignored=("*.rotary_emb.inv_freq", "lm_head.weight"),
)

_QWEN3 = _LLAMA._replace(
    base=dataclasses.replace(QWEN3["qwen3-0.6b"], kv_heads=0, ffn_width=0, tied=False),
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    tensors=_LLAMA.tensors
    | {
        "blocks/*/attention/query_norm/scale": "model.layers.*.self_attn.q_norm.weight",
        "blocks/*/attention/key_norm/scale": "model.layers.*.self_attn.k_norm.weight",
    },
    heads={"Qwen3ForCausalLM": {}},
)

_MASKED_TOKEN_HEAD = {
    **_linear("head/dense", "cls.predictions.transform.dense"),
    **_norm("head/norm", "cls.predictions.transform.LayerNorm"),
    "head/bias": "cls.predictions.bias",
}

_BERT = Family(
    base=BERT["bert-base"],
    keys={
        "vocab_size": "vocab_size",
        "context": "max_position_embeddings",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ffn_width": "intermediate_size",
        "token_types": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
    },
    fixed={
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    tensors={
        "tokens/embedding": "bert.embeddings.word_embeddings.weight",
        "positions/embedding": "bert.embeddings.position_embeddings.weight",
        "types/embedding": "bert.embeddings.token_type_embeddings.weight",
        **_norm("norm", "bert.embeddings.LayerNorm"),
        **_linear("blocks/*/attention/query", "bert.encoder.layer.*.attention.self.query"),
        **_linear("blocks/*/attention/key", "bert.encoder.layer.*.attention.self.key"),
        **_linear("blocks/*/attention/value", "bert.encoder.layer.*.attention.self.value"),
        **_linear("blocks/*/attention/out", "bert.encoder.layer.*.attention.output.dense"),
        **_norm("blocks/*/attention_norm", "bert.encoder.layer.*.attention.output.LayerNorm"),
        **_linear("blocks/*/mlp/up", "bert.encoder.layer.*.intermediate.dense"),
        **_linear("blocks/*/mlp/down", "bert.encoder.layer.*.output.dense"),
        **_norm("blocks/*/mlp_norm", "bert.encoder.layer.*.output.LayerNorm"),
    },
    heads={
        "BertForMaskedLM": _MASKED_TOKEN_HEAD,
        "BertForSequenceClassification": {
            **_linear("head/dense", "bert.pooler.dense"),
            **_linear("head/out", "classifier"),
        },
        "BertForPreTraining": _MASKED_TOKEN_HEAD,
    },
    # Tensors of BertForPreTraining that a masked language model does not have.
    ignored=(
        "*.position_ids",
        "cls.predictions.decoder.*",
        "bert.pooler.dense.*",
        "cls.seq_relationship.*",
    ),
)

FAMILIES = {"gpt2": _GPT2, "llama": _LLAMA, "qwen3": _QWEN3, "bert": _BERT}
"""The families by `model_type`."""
