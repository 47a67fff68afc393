"""Files of a tokenizer that did not change are the base's own, byte for byte.

A library that loads and saves a tokenizer writes other files than it read, and other tools may read these otherwise. So
whatever a merge did not change is copied from the base's folder. What did not change is found by saving the base's
tokenizer once more: where both files are equal, so is what they say.
"""

from __future__ import annotations

from pathlib import Path

from weft.files.whole import copy_file, remove, temporary_place, writing_temporary
from weft.foreign import read_json
from weft.models import gate

_TEMPLATE, _SETTINGS, _TOKENS = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"
# Other forms of what tokenizer.json says, which some tools read instead of it.
_FORMS = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
          "spiece.model", "sentencepiece.bpe.model")  # fmt: skip


def keep_unchanged(part: Path, source: Path) -> list[str]:
    """Put the base's own files in the place of those in ``part`` that say the same; gives their names.

    Args:
        part: a new folder with a tokenizer that transformers has saved.
        source: the base's folder.

    Raises:
        WriteError: The machine refuses to write.
    """
    with temporary_place() as again:
        with writing_temporary():
            gate.load_tokenizer(source).save_pretrained(again)
        same = {path.name for path in again.iterdir() if _equal(path, part / path.name)}
        if not (again / _TEMPLATE).exists() and not (part / _TEMPLATE).exists():
            same.add(_TEMPLATE)
    kept = [_TOKENS, *_FORMS] if _TOKENS in same else []
    settings = source / _SETTINGS
    # Older files hold the template in the settings, where some tools look first.
    inside = settings.is_file() and "chat_template" in read_json(settings)
    if _SETTINGS in same and (_TEMPLATE in same or not inside):
        kept.append(_SETTINGS)
    if _TEMPLATE in same:
        kept.append(_TEMPLATE)
    copied = [name for name in kept if (source / name).is_file()]
    for name in copied:
        copy_file(source / name, part / name)
    if inside and _SETTINGS in copied and _TEMPLATE in same and _TEMPLATE not in copied:
        remove(part / _TEMPLATE)  # the settings hold it
    return sorted(copied)


def _equal(one: Path, other: Path) -> bool:
    return other.is_file() and one.is_file() and one.read_bytes() == other.read_bytes()
