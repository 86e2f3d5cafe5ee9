"""Builds the tokenizer of a Hugging Face folder from tokenizer.json and the small JSON files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dseek.core.errors import FileFormatError
from dseek.models.folder_files import MAX_JSON_BYTES, read_json_object
from dseek.models.hf_codec import HuggingFaceCodec, call_library
from dseek.models.tokenizer import Tokenizer

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_from_folder(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Build a tokenizer.

    Args:
        folder: the model's folder.
        config: its config.json.

    Returns:
        The tokenizer; its end tokens are those of generation_config.json (else config.json) and tokenizer_config.json.

    Raises:
        FileFormatError: tokenizer.json is missing or broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileFormatError(
            f"{folder} has no tokenizer.json", remedy="download it, or save the tokenizer in the fast format"
        )
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FileFormatError(f"{path} has {path.stat().st_size} bytes", needed=f"at most {MAX_JSON_BYTES}")
    from tokenizers import Tokenizer as Backend

    codec = HuggingFaceCodec(call_library(f"{path} is broken", lambda: Backend.from_file(str(path))))
    names = _special_tokens(folder)
    generation = _optional_json(folder / "generation_config.json")
    ends = _ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id"))
    named_end = codec.token_id(names["eos_token"]) if "eos_token" in names else None
    if named_end is not None:
        ends = tuple(dict.fromkeys((*ends, named_end)))
    bos = codec.token_id(names["bos_token"]) if "bos_token" in names else None
    if bos is None:
        bos = next(iter(_ids(config.get("bos_token_id"))), None)
    return Tokenizer(
        codec,
        bos_token_id=bos,
        eos_token_ids=tuple(token_id for token_id in ends if token_id < codec.vocab_size),
        chat_template=read_chat_template(folder),
        special_tokens=names,
    )


def read_chat_template(folder: Path) -> str | None:
    """Find the chat template of a folder.

    Args:
        folder: the model's folder.

    Returns:
        The text of chat_template.jinja, else the (default) template of tokenizer_config.json, else None.

    Raises:
        FileFormatError: a file is broken.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FileFormatError(f"{path} has {path.stat().st_size} bytes", needed=f"at most {MAX_JSON_BYTES}")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise FileFormatError(f"{path} is not UTF-8") from None
    template = _optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the named special tokens."""
    names: dict[str, str] = {}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = _optional_json(folder / file_name)
        for name in _SPECIAL_NAMES:
            value = values.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                names[name] = value
    return names


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids from a number or a list; anything else is none."""
    values = value if isinstance(value, list) else [value]
    return tuple(entry for entry in values if isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0)
