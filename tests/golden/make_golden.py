"""Writes the golden files: logits of small models as `transformers` computes them.

Run it by hand in an environment with torch 2.13.0 and transformers 5.23.0; tests never run it:

    python tests/golden/make_golden.py

NAME.npz holds the config.json that transformers wrote, the name and shape of each saved tensor, the
inputs, and float32 logits. Weights are not stored: `weights` draws them again.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SHARED = {"vocab_size": 61}
GPT2 = {
    "n_positions": 16,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": None,
    "eos_token_id": None,
    **SHARED,
}
LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-3,
    **SHARED,
}
BERT = {
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "layer_norm_eps": 1e-3,
    **SHARED,
}
QWEN3 = LLAMA | {
    "head_dim": 8,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
CASES = {
    "gpt2": ("GPT2", "GPT2LMHeadModel", GPT2),
    "gpt2-layer-scale": (
        "GPT2",
        "GPT2LMHeadModel",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40},
    ),
    "llama": ("Llama", "LlamaForCausalLM", LLAMA),
    "llama-tied": ("Llama", "LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", QWEN3),
    "bert": ("Bert", "BertForMaskedLM", BERT),
    "bert-classes": ("Bert", "BertForSequenceClassification", BERT | {"num_labels": 5}),
}


def weight(name: str, shape: tuple[int, ...], stream: np.random.PCG64) -> np.ndarray:
    """Uniform on (-.5, .5), scales around one, so that attention is uneven and no unit is dead.

    Drawn from raw bits, whose stream NumPy guarantees across versions.
    """
    bits = stream.random_raw(int(np.prod(shape))) >> np.uint64(11)
    uniform = (bits * 2.0**-53 - 0.5).reshape(shape)
    scale = "norm" in name.lower() or "ln_" in name
    return (uniform + (scale and name.endswith("weight"))).astype(np.float32)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The weights of a model, drawn from one stream in the order of names."""
    stream = np.random.PCG64(0)
    return {name: weight(name, shapes[name], stream) for name in sorted(shapes)}


def tokens() -> dict[str, np.ndarray]:
    """Two rows with a second sentence each; the second row ends with four tokens of padding."""
    stream = np.random.PCG64(1)
    ids = (stream.random_raw(24) % np.uint64(SHARED["vocab_size"])).reshape(2, 12).astype(np.int32)
    mask, types = np.ones_like(ids), np.zeros_like(ids)
    mask[1, 8:], types[:, 5:] = 0, 1
    return {"tokens": ids, "mask": mask, "types": types}


def make(name: str) -> None:
    """Writes `name`.npz."""
    import torch
    import transformers
    from safetensors import safe_open

    config, kind, fields = CASES[name]
    inputs = tokens()
    model = getattr(transformers, kind)(getattr(transformers, config + "Config")(**fields)).eval()
    # A tied matrix appears once here, under the name in the saved file.
    own = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in weights({key: tuple(p.shape) for key, p in own.items()}).items():
            own[key].copy_(torch.from_numpy(value))
        arguments = {"input_ids": inputs["tokens"], "attention_mask": inputs["mask"]}
        arguments |= {"token_type_ids": inputs["types"]} if config == "Bert" else {}
        tensors = {key: torch.from_numpy(value).long() for key, value in arguments.items()}
        logits = model(**tensors).logits.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        text = (Path(folder) / "config.json").read_text()
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert set(shapes) == set(own), set(shapes) ^ set(own)
    assert np.isfinite(logits).all() and logits.dtype == np.float32
    np.savez(HERE / name, config=text, shapes=json.dumps(shapes), logits=logits, **inputs)
    print(f"{name}: {sum(map(np.prod, shapes.values()))} weights, |logits| {abs(logits).max():.3f}")


def make_dtypes() -> None:
    """Writes dtypes.safetensors: 0, 1, 2, ... in every dtype, a scalar, and nothing."""
    import torch
    from safetensors.torch import save_file

    floats, integers = ["float64", "float32", "float16", "bfloat16"], ["int64", "int32", "int16"]
    numbers = torch.arange(6).reshape(2, 3)
    tensors = {
        name: numbers.to(getattr(torch, name))
        for name in [*floats, *integers, "int8", "uint8", "bool"]
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3)}
    save_file(tensors, HERE / "dtypes.safetensors")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
    make_dtypes()
