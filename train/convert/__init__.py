"""Runs from Hugging Face folders and back: model, tokenizer, special tokens and class names."""
