"""The fingerprint of a renderer: readable fields and SHA-256 sums of all that decides its tokens."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from weft.data.rendering.drafts import Drafter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fingerprint(renderer: Drafter) -> dict[str, Any]:
    """See ``Renderer.fingerprint``."""
    fields: dict[str, Any] = {
        "template": {"name": renderer.template.name or "custom", "sha256": _sum(renderer.template.text)},
        **renderer.settings.model_dump(exclude={"chat_template", "allow_unknown_markers"}),
        "tokenizer": {"vocab_size": len(renderer.tokenizer), "sha256": tokenizer_hash(renderer.tokenizer)},
    }
    # Only plain data, so that a fingerprint from a file compares equal.
    fields = json.loads(json.dumps(fields, ensure_ascii=False, default=str))
    return {**fields, "sha256": _sum(json.dumps(fields, ensure_ascii=False, sort_keys=True))}


_PROBE = "  What's 12,345 + 67?\n\n\tNaïve café: 你好，世界 — 🧵 <s> </s> <|im_end|>"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that turns text into ids: vocabulary, merges, rules and special tokens, not the template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # every call sets them anew
            state.pop(passing, None)
    else:
        state = {"vocabulary": tokenizer.get_vocab()}
    # The rules of a slow tokenizer show in the ids of a text.
    state["probe"] = list(tokenizer(_PROBE, verbose=False)["input_ids"])
    # The pad token changes no token of ours.
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return _sum(json.dumps([state, special], ensure_ascii=False, sort_keys=True))


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
