"""A model for live vLLM runs without downloads: random weights, one character a token."""

from __future__ import annotations

import json
from pathlib import Path

CHARACTERS = 256  # of the smallest vocabulary
SPECIAL = {"<unk>": CHARACTERS, "<s>": CHARACTERS + 1, "</s>": CHARACTERS + 2}


def write_tiny_model(
    folder: Path,
    *,
    layers: int = 2,
    hidden_size: int = 128,
    intermediate_size: int | None = None,
    heads: int = 4,
    kv_heads: int | None = None,
    vocab_size: int | None = None,
    max_position_embeddings: int = 8192,
) -> Path:
    """Write a Qwen2 model's config and a tokenizer; serve it with ``--load-format dummy``.

    Args:
        folder: made if it is not there.
        hidden_size: a multiple of 32 ``heads``: vLLM's CPU kernels ask for heads of at least 32.
        intermediate_size: twice ``hidden_size`` if None. kv_heads: as many as ``heads`` if None.
        vocab_size: of embedding and LM head; the tokenizer's 259 if None.

    Returns:
        the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "vocab_size": vocab_size or CHARACTERS + len(SPECIAL),
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": True,
        "bos_token_id": SPECIAL["<s>"],
        "eos_token_id": SPECIAL["</s>"],
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, vocab_size=vocab_size, model_max_length=max_position_embeddings)
    return folder


def write_tokenizer(folder: Path, *, vocab_size: int | None = None, model_max_length: int = 8192) -> None:
    """Write a tokenizer with one character a token.

    So the text of any tokens is read as the same tokens again, which a benchmark that sends its prompts as
    text (vLLM 0.23's) relies on.
    """
    special = set(SPECIAL.values())
    size = max(vocab_size or 0, CHARACTERS + len(SPECIAL))
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            | {"id": number, "content": name, "special": True}
            for name, number in SPECIAL.items()
        ],
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "vocab": {_character(number): number for number in range(size) if number not in special}
            | SPECIAL,
            "merges": [],
            "unk_token": "<unk>",
        },
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "</s>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length,
        },
        "generation_config.json": {"eos_token_id": SPECIAL["</s>"]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def _character(number: int) -> str:
    """A character of its own for every number; neither a control character of ASCII nor half of a pair."""
    code = ord(" ") + number
    return chr(code if code < 0xD800 else code + 0x800)
