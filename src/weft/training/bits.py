"""The keys by which other tools ask for a base in 4 or 8 bits, as the two that there are here."""

from __future__ import annotations

from collections.abc import Mapping

from weft.errors import UserError, check_word
from weft.switches import is_on

# transformers' BitsAndBytesConfig, LLaMA-Factory, ms-swift.
_KIND = ("bnb_4bit_quant_type", "quantization_type")
_DOUBLE = ("bnb_4bit_use_double_quant",)
_BLOCK = ("bnb_4bit_blocksize",)
_COMPUTE = ("bnb_4bit_compute_dtype",)
_STORAGE = ("bnb_4bit_quant_storage",)
_BY = ("quantization_method", "quant_method")
_COUNT = ("quantization_bit", "quant_bits")
_LOAD = {"load_in_4bit": 4, "load_in_8bit": 8}
_SHORT = {"bf16": "bfloat16", "fp16": "float16"}
DETAILS = (*_KIND, *_DOUBLE, *_BLOCK, *_COMPUTE, *_STORAGE, *_BY)
# Theirs, and what they mean, for the reference.
TOLD = {
    "load_in_4bit": "`quantization: nf4` if on, or the kind that `bnb_4bit_quant_type` names",
    "load_in_8bit": "`quantization: int8` if on",
    "quantization_bit`, `quant_bits": "`quantization`: 4 → `nf4`, or the kind that `bnb_4bit_quant_type` names; "
    "8 → `int8`",
    "bnb_4bit_quant_type`, `quantization_type": "the kind of 4 bits, `nf4` or `fp4`",
    "bnb_4bit_use_double_quant": "`double_quantization`",
    "bnb_4bit_blocksize": "`quantization_block_size`",
    "bnb_4bit_compute_dtype": "`dtype`, or `quantization_dtype` if `dtype` is said and is another one",
    "bnb_4bit_quant_storage": "nothing if `uint8`; others are refused",
    "quantization_method`, `quant_method": "nothing if `bitsandbytes` or `bnb`; others are refused",
    "quantization_config": "the keys above, in a mapping",
}


def in_our_words(given: Mapping[str, object], where: str) -> dict[str, object]:
    """``given`` with ``quantization``, its details and ``dtype`` in the place of the other tools' keys.

    Raises:
        UserError: They ask for what is not here, or for two things at once.
    """
    rest = dict(given)
    inside = rest.pop("quantization_config", None)
    if isinstance(inside, Mapping):
        if twice := inside.keys() & rest.keys():
            raise UserError(f"{where}: '{min(twice)}' stands in quantization_config and beside it; keep one.")
        strange = [key for key in inside if key not in (*_LOAD, *_COUNT, *DETAILS)]
        if strange:
            raise UserError(f"{where}: quantization_config: '{strange[0]}' is not known here; leave it out.")
        rest |= inside
    elif inside is not None:
        raise UserError(f"{where}: quantization_config: expected key: value, not {inside!r}.")
    asked = {key: rest.pop(key) for key in (*_LOAD, *_COUNT, *DETAILS) if key in rest}
    if not asked:
        return rest
    bits = _bits(asked, where)
    _check_details(asked, bits, where)
    if bits is not None:
        kind = next((asked[key] for key in _KIND if asked.get(key)), "nf4")
        _add(rest, "quantization", kind if bits == 4 else "int8", where, "the keys for 4 or 8 bits")
    if rest.get("quantization") in ("nf4", "fp4"):
        _add_details(rest, asked, where)
    return rest


def _add_details(rest: dict[str, object], asked: Mapping[str, object], where: str) -> None:
    for key in _DOUBLE:
        if asked.get(key) is not None:
            _add(rest, "double_quantization", is_on(asked[key], key), where, f"'{key}'")
    for key in _BLOCK:
        if asked.get(key) is not None:
            _add(rest, "quantization_block_size", asked[key], where, f"'{key}'")
    computes = str(asked.get("bnb_4bit_compute_dtype") or "auto").removeprefix("torch.")
    computes = _SHORT.get(computes, computes)
    short = next((word for key, word in _SHORT.items() if is_on(rest.get(key), key)), None)
    dtype = rest.get("dtype")
    said = short or (_SHORT.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    if computes in ("auto", said):
        return
    if said in (None, "auto"):
        rest["dtype"] = computes
    else:
        _add(rest, "quantization_dtype", computes, where, "'bnb_4bit_compute_dtype'")


def _bits(asked: Mapping[str, object], where: str) -> int | None:
    """4 or 8; None: the base is not quantised."""
    found = {key: bits for key, bits in _LOAD.items() if is_on(asked.get(key), key)}
    for key in _COUNT:
        count = asked.get(key)
        if count not in (None, 4, 8, 16):
            raise UserError(f"{key}: {count!r}: a base is kept in 4 (nf4) or 8 bits (int8).")
        if isinstance(count, int) and count != 16:
            found[key] = count
    if len(found) > 1:
        raise UserError(f"{where}: {' and '.join(map(repr, found))} both say how a base is kept; keep one.")
    return next(iter(found.values()), None)


def _check_details(asked: Mapping[str, object], bits: int | None, where: str) -> None:
    for key in _KIND:
        if asked.get(key) is not None:
            check_word(f"{where}: {key}", asked[key], ("nf4", "fp4"))
    for key in _STORAGE:
        if bits == 4 and asked.get(key) not in (None, "uint8", "torch.uint8"):
            raise UserError(f"{where}: {key}: 4 bits are kept in uint8 here, not in {asked[key]!r}; leave it out.")
    for key in _BY:
        if asked.get(key) not in (None, "bitsandbytes", "bnb"):
            raise UserError(
                f"{where}: {key}: {asked[key]!r} is not in this version of Weft; bitsandbytes (bnb) is. A base that "
                "was quantised otherwise is taken in its full weights."
            )


def _add(rest: dict[str, object], key: str, value: object, where: str, whence: str) -> None:
    if rest.get(key, value) not in (value, "auto"):
        raise UserError(f"{where}: '{key}' is {rest[key]!r}, and {whence} ask for {value!r}; keep one.")
    rest[key] = value
