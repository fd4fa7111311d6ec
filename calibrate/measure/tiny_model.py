"""A model for live vLLM runs without downloads: random weights, one token a byte."""

from __future__ import annotations

import json
from pathlib import Path

BYTES = 256
SPECIAL = {"<unk>": BYTES, "<s>": BYTES + 1, "</s>": BYTES + 2}


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
    """Write a Qwen2 model's config and byte-level tokenizer; serve it with ``--load-format dummy``.

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
        "vocab_size": vocab_size or BYTES + len(SPECIAL),
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
    """Write a byte-level tokenizer: one token a byte, and made-up words up to ``vocab_size``.

    The words are never the result of tokenizing, but a model may generate them.
    """
    first_word = BYTES + len(SPECIAL)
    words = {f"w{number}": number for number in range(first_word, vocab_size or first_word)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
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
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {symbol: byte for byte, symbol in enumerate(_byte_symbols())} | SPECIAL | words,
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
            "model_max_length": model_max_length,
        },
        "generation_config.json": {"eos_token_id": SPECIAL["</s>"]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def _byte_symbols() -> list[str]:
    """GPT-2's printable character for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {
        byte: chr(BYTES + index) for index, byte in enumerate(others)
    }
    return [symbol[byte] for byte in range(BYTES)]
