"""A model for live vLLM runs without downloads: random weights, one token a byte."""

from __future__ import annotations

import json
from pathlib import Path

BYTES = 256
SPECIAL = {"<unk>": BYTES, "<s>": BYTES + 1, "</s>": BYTES + 2}


def write_tiny_model(
    folder: Path, *, layers: int = 2, hidden_size: int = 128, max_position_embeddings: int = 8192
) -> Path:
    """Write a Qwen2 model's config and byte-level tokenizer; serve it with ``--load-format dummy``.

    ``hidden_size`` is a multiple of 128: four heads, of at least 32 each, which vLLM's CPU kernels ask for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": BYTES + len(SPECIAL),
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": True,
        "bos_token_id": SPECIAL["<s>"],
        "eos_token_id": SPECIAL["</s>"],
        "torch_dtype": "bfloat16",
    }
    symbols = _byte_symbols()
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
            "vocab": {symbol: byte for byte, symbol in enumerate(symbols)} | SPECIAL,
            "merges": [],
            "unk_token": "<unk>",
        },
    }
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": max_position_embeddings,
        },
        "generation_config.json": {"eos_token_id": SPECIAL["</s>"]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _byte_symbols() -> list[str]:
    """GPT-2's printable character for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {
        byte: chr(BYTES + index) for index, byte in enumerate(others)
    }
    return [symbol[byte] for byte in range(BYTES)]
