"""The checks of a model's and a tokenizer's configurations before transformers acts on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import UserError
from weft.foreign import check_json, parse_json, read_json
from weft.patterns import check_linear

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

# Weft chooses the code that computes attention; these words only describe another machine.
_COMPUTED_BY = ("attn_implementation", "experts_implementation")
_KNOWN_WAYS = (
    None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "grouped_mm", "batched_mm",
)  # fmt: skip
# Keys that make transformers fetch and run code, or open another file.
_NEVER = (
    "custom_generate", "use_kernels", "kernel_config", "transformers_weights", "trust_remote_code", "custom_pipelines",
    "gguf_file", "tokenizer_object", "init_inputs", "code_revision", "vlm_config_path",
)  # fmt: skip
_QUANTIZATIONS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
# The largest sensible value of each key in a configuration, by a part of the key; the first match counts.
_COUNTS = (
    ("position", 1 << 28), ("length", 1 << 28), ("token_id", 1 << 28), ("theta", None), ("layer", 1 << 12),
    ("block", 1 << 16), ("expert", 1 << 14), ("head_dim", 1 << 16), ("head", 1 << 14), ("label", 1 << 16),
    ("vocab", 1 << 24), ("n_ctx", 1 << 28), ("window", 1 << 28), ("chunk", 1 << 28),
    ("size", 1 << 22), ("dim", 1 << 22), ("d_model", 1 << 20), ("d_ff", 1 << 22), ("d_kv", 1 << 16), ("inner", 1 << 22),
    ("embd", 1 << 20), ("width", 1 << 20), ("kernel", 1 << 16), ("rank", 1 << 20), ("state", 1 << 20),
    ("group", 1 << 16), ("stage", 1 << 10), ("channel", 1 << 20), ("depth", 1 << 10),
)  # fmt: skip
# Keys whose value must be a positive integer where it is given.
_SIZES = frozenset(
    ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
     "intermediate_size", "n_layer", "n_head", "n_embd", "d_model", "d_ff", "num_layers", "num_heads", "n_positions",
     "max_position_embeddings", "head_dim", "ffn_dim")
)  # fmt: skip
_REGEX = re.compile(rb'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")')
_ADDED = re.compile(rb'"id"\s*:\s*([0-9]{1,18})')
_MOST_TOKENS = 1 << 24
# A model may hold so much more than its files: buffers, tied tensors, weights in half a byte.
_SPARE_ELEMENTS = 1 << 25


def check_config(path: Path) -> None:
    """Refuse a model's ``config.json`` that asks for code, for other packages or files, or for absurd sizes.

    Raises:
        UserError: It does, or it is no JSON object.
    """
    entries = read_json(path, infinities=True)
    _check_known(entries, path)
    for where, key, value in _entries(entries):
        place = f"{path}: {where}{key}"
        name = key.strip("_").removesuffix("_internal")
        if name in _COMPUTED_BY:
            _check_way(value, place)
        elif key in _NEVER:
            _check_never(value, place, "model's")
        elif key == "tokenizer_class" and value is not None:
            _check_class(value, place)
        elif isinstance(value, float) and value != value:
            raise UserError(f"{place} is NaN, which JSON does not have.")
        else:
            _check_size(key, value, place)
        if key == "auto_map" and where:
            raise UserError(f"{place}: a part of the model asks for its own code, and Weft runs no code from a file.")
    quantized = entries.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if isinstance(quantized, dict) and method in ("gptq", "awq"):
        check_packed(quantized, f"{path}: quantization_config")
    elif quantized is not None and not (isinstance(method, str) and method in _QUANTIZATIONS):
        old = isinstance(quantized, dict) and (quantized.get("load_in_4bit") or quantized.get("load_in_8bit"))
        if method is not None or not old:
            raise UserError(
                f"{path}: quantization_config.quant_method is {_short(method)}; Weft loads bases that are not "
                "quantised, or by bitsandbytes, gptq or awq. Take the unquantised model (quantization: nf4 makes it "
                "small)."
            )


# The key of a checkpoint by GPTQ or AWQ -> the values that can be read; None: the key is not there.
_PACKED: dict[str, dict[str, tuple[object, ...]]] = {
    "gptq": {"bits": (2, 3, 4, 8), "checkpoint_format": (None, "gptq", "gptq_v2"), "dynamic": (None, {})},
    "awq": {"bits": (4,), "version": (None, "gemm", "GEMM"), "zero_point": (None, True)},
}


def check_packed(entries: dict[str, object], where: str) -> None:
    """Refuse a checkpoint by GPTQ or AWQ in a form that is not read here.

    Raises:
        UserError: It is in one; the message names the key.
    """
    for key, known in _PACKED[str(entries["quant_method"])].items():
        value = entries.get(key)
        if type(value) not in map(type, known) or value not in known:
            told = ", ".join(str(one) for one in known if one is not None)
            raise UserError(f"{where}.{key} is {_short(value)}; of {entries['quant_method']} Weft reads {told}.")
    size = entries.get("group_size", 128)
    if type(size) is not int or not (size == -1 or 0 < size <= 1 << 16):
        raise UserError(f"{where}.group_size is {_short(size)}; expected -1 or the number of inputs in a group.")


def _check_known(entries: dict[str, object], path: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = entries.get("model_type")
    if kind is None:
        raise UserError(f"{path} cannot be used: it has no model_type, so it is not known for which model it is.")
    if not isinstance(kind, str):
        raise UserError(f"{path}: model_type is {_short(kind)}; expected the name of an architecture.")
    if kind in CONFIG_MAPPING:
        return
    if entries.get("auto_map"):
        raise UserError(
            f"{path}: model_type {_short(kind)} is made by Python code that comes with the model (auto_map), and Weft "
            "runs no code from a file. Take a model of an architecture that transformers has itself."
        )
    raise UserError(f"{path} cannot be used: model_type {_short(kind)} is none that this transformers knows.")


def check_tokenizer(path: Path) -> None:
    """Refuse a ``tokenizer_config.json`` that asks for code or for files elsewhere.

    Raises:
        UserError: It does; the message names the key.
    """
    entries = read_json(path, infinities=True)
    kind = entries.get("tokenizer_class")
    if kind is not None:
        _check_class(kind, f"{path}: tokenizer_class")
    if entries.get("auto_map") and not _class(str(kind or "")):
        raise UserError(
            f"{path}: auto_map asks for Python code that comes with the tokenizer, and Weft runs no code from a file."
        )
    for where, key, value in _entries(entries):
        place = f"{path}: {where}{key}"
        if key in _NEVER:
            _check_never(value, place, "tokenizer's")
        if key.endswith(("_file", "_path", "_files", "_dir", "dicdir")):
            _check_inside(value, place)
        if key in ("chat_template", "template") and isinstance(value, str) and len(value) > 1 << 20:
            raise UserError(f"{place} is a template of {len(value)} characters, which no tokenizer has.")
    decoder = entries.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        wrong = next((key for key in decoder if not (key.isdecimal() and len(key) < 10)), None)
        if wrong is not None:
            raise UserError(f"{path}: added_tokens_decoder: {_short(wrong)} is no token's number.")


def check_tokenizer_json(path: Path) -> None:
    """Refuse a ``tokenizer.json`` whose patterns could be tried for ever: the library that applies them has no limit.

    The vocabulary is not decoded here: the library reads it.

    Raises:
        UserError: A pattern could be, or a token's number is absurd.
    """
    data = check_json(path)
    for found in _REGEX.finditer(data):
        text = parse_json(found[1], f"{path}: a Regex")
        if isinstance(text, str):
            check_linear(text, f"{path}: the Regex")
    far = max((int(number) for number in _ADDED.findall(data)), default=0)
    if far > _MOST_TOKENS:
        raise UserError(f"{path}: a token has the number {far}; no tokenizer has more than {_MOST_TOKENS} tokens.")


def check_generation(path: Path) -> None:
    """Refuse a ``generation_config.json`` that asks for code.

    Raises:
        UserError: It does.
    """
    for where, key, value in _entries(read_json(path, infinities=True)):
        if (key in _NEVER or key in ("auto_map", "prompt_lookup_code")) and value:
            raise UserError(f"{path}: {where}{key} is {_short(value)}: Weft runs no code from a file.")


def no_implementation(config: object) -> None:
    """Let transformers choose the code for attention and experts, in all parts, by the installed packages."""
    parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))]
    for part in parts:
        for name in _COMPUTED_BY:
            if getattr(part, f"_{name}", None) is not None:
                setattr(part, f"_{name}", None)


def check_layers(config: PreTrainedConfig, tensors: int, where: str) -> None:
    """Refuse more layers than the files of weights have tensors: building 4,000 takes half a minute.

    Raises:
        UserError: There are more.
    """
    for part in (config, config.get_text_config()):
        for key in ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer"):
            found = getattr(part, key, None)
            if isinstance(found, int) and found > max(tensors, 8):
                raise UserError(f"{where}: {key} is {found}, and the files of weights hold only {tensors} tensors.")


def bits_of(config: PreTrainedConfig) -> int:
    """The fewest bits that a number of the weights takes, by the configuration of their quantisation; at most 4."""
    entries = getattr(config, "quantization_config", None)
    found = entries.get("own", entries).get("bits") if isinstance(entries, dict) else None
    return min(found, 4) if isinstance(found, int) and found > 0 else 4


def check_budget(model: nn.Module, stored: int, where: str, bits: int = 4) -> None:
    """Refuse sizes that the files of weights cannot have: transformers would allocate them first and compare later.

    Args:
        model: A model on the meta device.
        stored: The number of bytes in the files of weights.
        bits: The fewest that a number may take there.

    Raises:
        UserError: The model is larger than its files allow.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    wanted = sum(tensor.numel() for tensor in tensors)
    if wanted > 8 / bits * stored + _SPARE_ELEMENTS:
        raise UserError(
            f"{where} cannot be right: it describes a model of {wanted:,} numbers, and the files of weights "
            f"beside it hold {stored:,} bytes."
        )


def _entries(values: dict[str, object]) -> Iterator[tuple[str, str, object]]:
    """(place, key, value) of everything inside, level by level."""
    todo: list[tuple[str, object]] = [("", values)]
    while todo:
        where, value = todo.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                yield where, str(key), item
                todo.append((f"{where}{str(key)[:60]}.", item))
        elif isinstance(value, list):
            todo += ((where, item) for item in value if isinstance(item, (dict, list)))


def _check_never(value: object, place: str, whose: str) -> None:
    if value:
        raise UserError(
            f"{place} is {_short(value)}, which would have code or files loaded that are not the {whose}; Weft does "
            "not."
        )


def _check_way(value: object, place: str) -> None:
    ways = value.values() if isinstance(value, dict) else [value]
    for way in ways:
        if not (way is None or isinstance(way, str)) or way not in _KNOWN_WAYS:
            raise UserError(
                f"{place} is {_short(way)}, which transformers would fetch from a hub and run; Weft runs no code "
                "from a file. Delete the entry: Weft computes attention by itself."
            )


def _check_size(key: str, value: object, place: str) -> None:
    if key in _SIZES and value is not None and not isinstance(value, (list, dict)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{place} is {_short(value)}; expected a whole number.")
        if value < 1:
            raise UserError(f"{place} is {value}; expected 1 or more.")
    numbers = [value] if isinstance(value, int) else value if isinstance(value, list) else []
    most = next((most for part, most in _COUNTS if part in key.lower()), 1 << 40)
    if most is None:
        return
    for number in numbers:
        if isinstance(number, int) and abs(number) > most:
            raise UserError(f"{place} is {_short(number)}; no model has more than {most}.")


def _check_inside(value: object, place: str) -> None:
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and (Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name):
            raise UserError(f"{place} is {_short(name)}, which is not in the tokenizer's own folder.")


def _check_class(value: object, place: str) -> None:
    """Refuse a class of transformers that is no tokenizer; for an unknown class it takes the plain one."""
    import transformers

    if not isinstance(value, str):
        raise UserError(f"{place} is {_short(value)}; expected the name of a tokenizer's class.")
    if _class(value) is None and (not value.isidentifier() or value in dir(transformers)):
        raise UserError(f"{place} is {_short(value)}, which is no class of tokenizers.")


def _class(name: str) -> object:
    """transformers' class of tokenizers of that name; None if it has none."""
    import transformers

    for one in (name, name.removesuffix("Fast")):
        # Compare names first, because asking for a class imports its module, with all effects of that.
        named_so = one.isidentifier() and ("Tokenizer" in one or one.endswith("Backend"))
        found = getattr(transformers, one, None) if named_so else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase):
            return found
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
