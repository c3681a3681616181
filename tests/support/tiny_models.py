"""Hugging Face folders of tiny models, and tokenizers for them."""

import json
from typing import Any

import jax
import tokenizers as library

from models import huggingface, split

TEXT = "To be, or not to be: that is the question. Ünïcödé 中文!\n" * 150

SIZES: Any = {"context": 16, "width": 8, "layers": 1, "heads": 2, "ffn_width": 16}

END = "<|endoftext|>"


def byte_pairs(size=300):
    model = library.ByteLevelBPETokenizer()
    model.train_from_iterator([TEXT], size, special_tokens=[END], show_progress=False)
    return model


def word_pieces():
    model = library.BertWordPieceTokenizer(lowercase=True)
    model.train_from_iterator([TEXT], vocab_size=100, show_progress=False)
    return model


def model_in(folder, model, **notes):
    params = split(model).init(jax.random.key(0))
    huggingface.save(params, model, folder, **notes)
    return params


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))
