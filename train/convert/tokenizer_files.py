"""Takes over the tokenizer of a Hugging Face folder, in its newer or older format."""

from pathlib import Path
from typing import Any

from models import DecoderConfig, EncoderConfig
from models.reading import read_json
from models.writing import replace_text
from train.data import tokenizers
from train.data.tokenizers import for_transformers
from train.extras import need


def adopt(folder: Path, model: DecoderConfig | EncoderConfig, kept: Path) -> str:
    """Copies a folder's tokenizer, and returns its name as in `DataConfig`.

    Args:
      folder: of the model.
      model: its config.
      kept: where the files are copied to.

    Raises:
      ValueError: there is no tokenizer that can be read, or it has more tokens than the model.
    """
    older = _older(folder, model)
    if older is None:
        return "bytes"
    for_transformers.copy(folder, kept)
    library = need("tokenizers", "data", f"the tokenizer of {folder}")
    try:
        if older:
            _make(library, kept, *older)
        if for_transformers.is_bytes(read_json(kept / "tokenizer.json")):
            return "bytes"
        tokens = tokenizers.load(str(kept)).vocab_size
    except OSError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"the tokenizer of {folder} cannot be used: {error} Or choose one with --tokenizer."
        ) from error
    if tokens > model.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {tokens} tokens, more than the {model.vocab_size} of "
            "its model: take both from one source, or choose one with --tokenizer."
        )
    return str(kept.resolve())


def _older(folder: Path, model: DecoderConfig | EncoderConfig) -> tuple[str, ...] | None:
    """The files of a tokenizer in an older format; empty if the folder has a tokenizer.json.

    None if the folder has no tokenizer at all, and the model has a token for each byte.
    """
    has = {path.name for path in folder.iterdir()}
    if "tokenizer.json" in has:
        return ()
    simple = not has & {"added_tokens.json", "tokenizer.model"}
    if simple and isinstance(model, EncoderConfig) and "vocab.txt" in has:
        return ("vocab.txt",)
    if simple and _gpt2(model) and {"vocab.json", "merges.txt"} <= has:
        return "vocab.json", "merges.txt"
    if model.vocab_size == 256 and simple and not has & set(for_transformers.KEPT):
        return None
    raise ValueError(
        f"{folder} has no tokenizer that can be read: save it as a tokenizer.json, with "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers, or choose "
        "one with --tokenizer, such as bytes."
    )


def _make(library: Any, kept: Path, vocabulary: str, merges: str = "") -> None:
    """Writes the tokenizer.json of a tokenizer in an older format."""
    path = kept / "tokenizer_config.json"
    stated = read_json(path) if path.is_file() else {}
    if merges:
        made = for_transformers.byte_pairs(library, kept / vocabulary, kept / merges, stated)
    else:
        made = for_transformers.word_pieces(library, kept / vocabulary, stated)
    replace_text(kept / "tokenizer.json", made.to_str())


def _gpt2(model: DecoderConfig | EncoderConfig) -> bool:
    return isinstance(model, DecoderConfig) and model.positions == "learned"
