"""A model's folder as one GGUF file: its tensors in llama.cpp's layout, its settings, its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.data.rendering.tokens import Encoder
from weft.errors import UserError
from weft.export.gguf_architectures import (
    GgufArchitecture,
    architecture_of,
    head_size,
    rope_factors,
    rope_settings,
)
from weft.export.gguf_file import FORMATS, GgufContent, gguf_library
from weft.export.gguf_tokenizer import gguf_tokenizer
from weft.export.proof import fixed_texts
from weft.export.rendering import fixed_conversations
from weft.files.tensors import read_tensors
from weft.models import gate

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# The numbers by which llama.cpp calls what most of a file's tensors are kept in.
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_FREQUENCIES = "rope_freqs.weight"


def check_exportable(config: PreTrainedConfig) -> GgufArchitecture:
    """The record of a model's architecture, before its weights are read.

    Raises:
        UserError: It cannot be written as GGUF.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            "the model is quantised, and GGUF is made of plain weights; export the one that it was made of."
        )
    found = architecture_of(config)
    others = [name for name in config.architectures or () if "CausalLM" not in name]
    if others:
        raise UserError(
            f"{others[0]} is no model that writes text, and llama.cpp would run it as one; transformers runs the "
            "merged folder (weft merge)."
        )
    return found


def gguf_model(folder: Path, kind: str) -> GgufContent:
    """The content of the GGUF file of the model in a folder, its matrices kept as ``kind`` (f32, f16, bf16, q8_0).

    Raises:
        UserError: The architecture, a setting, a tensor or the tokenizer has no place in GGUF.
    """
    gguf_library()
    config = gate.load_config(folder)
    architecture = check_exportable(config)
    tokenizer = gate.load_tokenizer(folder)
    content = GgufContent(architecture.name)
    content.settings |= model_settings(architecture, config) | {"general.file_type": _FILE_TYPES[kind]}
    _add_tensors(content, architecture, config, _stored(folder), kind)
    if (factors := rope_factors(config)) is not None:
        content.keep(_FREQUENCIES, factors, "f32")
    found = gguf_tokenizer(
        tokenizer,
        content.tensors["token_embd.weight"].shape[0],
        ends=end_ids(folder, tokenizer),
        adds_bos=bool(Encoder(tokenizer).bos),
        conversations=fixed_conversations(fixed_texts()),
    )
    content.settings |= found.settings
    content.notes += found.notes
    others = sorted({FORMATS[one].lower() for one in content.formats.values()} - {kind})
    if others:
        count = sum(one != kind for one in content.formats.values())
        content.notes.append(f"{count} of {len(content.formats)} matrices have rows that {kind} cannot divide into its "
                             f"blocks of 32; they are {', '.join(others)}.")  # fmt: skip
    return content


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} holds no safetensors.")
    for path in paths:
        yield from read_tensors(path).items()


def _add_tensors(
    content: GgufContent,
    architecture: GgufArchitecture,
    config: PreTrainedConfig,
    stored: Iterator[tuple[str, Tensor]],
    kind: str,
) -> None:
    names = NameMap(architecture, config.num_hidden_layers)
    for key, tensor in stored:
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        content.keep(names(key), architecture.laid_out(key, tensor.float(), config), kind)


class NameMap:
    """llama.cpp's names of an architecture's tensors, by those of transformers."""

    def __init__(self, architecture: GgufArchitecture, blocks: int) -> None:
        gguf = gguf_library()
        number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self._map: Any = gguf.get_tensor_name_map(number, blocks)
        self._architecture = architecture.name

    def __call__(self, key: str) -> str:
        """llama.cpp's name of the tensor ``key``.

        Raises:
            UserError: It has none.
        """
        found = self._map.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"llama.cpp's {self._architecture} has no place for the tensor '{key}'.")
        return str(found)


def model_settings(architecture: GgufArchitecture, config: PreTrainedConfig) -> dict[str, str | int | float]:
    """The keys of a GGUF file about the model itself."""
    name, size, rope = architecture.name, head_size(config), rope_settings(config)
    found: dict[str, str | int | float] = {
        "general.type": "model",
        "general.quantization_version": 2,
        f"{name}.vocab_size": int(config.vocab_size),
        f"{name}.context_length": int(config.max_position_embeddings),
        f"{name}.embedding_length": int(config.hidden_size),
        f"{name}.block_count": int(config.num_hidden_layers),
        f"{name}.feed_forward_length": int(config.intermediate_size),
        f"{name}.attention.head_count": int(config.num_attention_heads),
        f"{name}.attention.head_count_kv": int(config.num_key_value_heads),
        f"{name}.attention.key_length": size,
        f"{name}.attention.value_length": size,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{name}.rope.dimension_count": size,
        f"{name}.rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        found |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": float(rope["factor"])}
    return found


def end_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of generation_config.json and the tokenizer's, the latter first if known."""
    from weft.foreign import read_json

    path = folder / "generation_config.json"
    given = read_json(path).get("eos_token_id") if path.is_file() else None
    listed: Sequence[object] = given if isinstance(given, list) else [given]
    first = [tokenizer.eos_token_id]
    return list(dict.fromkeys(one for one in (*first, *listed) if isinstance(one, int)))


def file_name(name: str, kind: str) -> str:
    """The usual name of a GGUF file: the model's, and what it is kept in."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.') or 'model'}-{kind}.gguf"
