"""The larger models, and the GPT-2 whose hyperparameters each takes where it has none published."""

GPT2_SIZE = {
    "gpt2-30m": "30m",
    "gpt2-125m": "125m",
    "gpt2-355m": "355m",
    "gpt2-540m": "540m",
    "gpt2-770m": "770m",
    "llama-60m": "30m",
    "llama-130m": "125m",
    "llama-350m": "355m",
    "llama-1b": "770m",
    "llama2-7b": "770m",
    "qwen3-134m": "125m",
    "qwen3-134m-gqa": "125m",
    "qwen3-0.6b": "540m",
    "bert-small": "30m",
    "bert-base": "125m",
}
