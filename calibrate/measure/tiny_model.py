"""A model for live vLLM runs without downloads: random weights, and a tokenizer of made-up words."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = 256  # of the smallest vocabulary
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD_LETTERS = 4  # about what a token of English has
SPECIAL = {"<unk>": WORDS, "<s>": WORDS + 1, "</s>": WORDS + 2}


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
        "vocab_size": vocab_size or WORDS + len(SPECIAL),
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
    """Write a tokenizer whose tokens are words of four letters, written without anything between them.

    So any tokens come back from their own text as the same tokens, which a benchmark that sends its prompts
    as text (vLLM 0.23's) relies on. Text of other kinds is one unknown token for every four characters.
    """
    size = max(vocab_size or 0, WORDS + len(SPECIAL))
    words = {_word(number): number for number in range(size) if number not in SPECIAL.values()}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number,
                "content": name,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for name, number in SPECIAL.items()
        ],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": rf"[\s\S]{{1,{WORD_LETTERS}}}"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": words | SPECIAL, "unk_token": "<unk>"},
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


def _word(number: int) -> str:
    """The number in base 26, as letters."""
    letters = ""
    for _ in range(WORD_LETTERS):
        number, digit = divmod(number, len(LETTERS))
        letters = LETTERS[digit] + letters
    return letters
