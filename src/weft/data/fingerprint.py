"""What decides the tokens that a record becomes, as a few readable fields and SHA-256 sums."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weft.data.render import Renderer


def fingerprint(renderer: Renderer) -> dict[str, Any]:
    """See ``Renderer.fingerprint``."""
    limit = renderer.limit
    fields: dict[str, Any] = {
        "template": {"name": renderer.template.name or "custom", "sha256": _sum(renderer.template.text)},
        "template_kwargs": renderer.template_kwargs,
        "train_on": renderer.train_on,
        "max_length": limit.max_length,
        "truncation": limit.truncation,
        "documents": limit.documents,
        "window_overlap": limit.overlap,
        "tokenizer": {"vocab_size": len(renderer.tokenizer), "sha256": tokenizer_sum(renderer.tokenizer)},
    }
    # Plain data only, so that what is read back from a file compares equal.
    fields = json.loads(json.dumps(fields, ensure_ascii=False, default=str))
    return {**fields, "sha256": _sum(json.dumps(fields, ensure_ascii=False, sort_keys=True))}


def tokenizer_sum(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer makes of text: vocabulary, merges, special tokens; not its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # set anew by every call
            model.pop(passing, None)
    else:
        model = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    # Who pads, and with what, changes no token of ours.
    special.pop("pad_token", None)
    return _sum(json.dumps([model, special], ensure_ascii=False, sort_keys=True))


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
