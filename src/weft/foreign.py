"""Small files by unknown authors: JSON, YAML, text, and the head of a safetensors file.

Every configuration passes through here. So none can hang or fill the memory, and other code sees nothing but
configurations. Only regular files are opened (a FIFO would wait for ever, a device would never end), and read up to a
limit. Nesting and digits are bounded, and so is the size of a YAML document with its aliases written out. Every fault
is a UserError with the file's name. ``weft.data.reading`` reads the records of data files instead.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import yaml

from weft.errors import UserError

JSON_LIMIT = 64 << 20  # bytes; a tokenizer.json takes 33 MB with 256,000 tokens, its configuration up to 20 MB
LINE_LIMIT = 1 << 20  # of one line of JSON Lines
_VALUES = 2_000_000  # of a JSON text; an empty list takes 3 bytes there and 64 in memory
YAML_LIMIT = 128 << 10  # the parser reads 100 KB a second
TEXT_LIMIT = 4 << 20
HEADER_LIMIT = 32 << 20  # of a safetensors file; 100,000 tensors take 12 MB
DEPTH = 64
_DIGITS = 100  # some tokenizers write 1e30 out for "no limit"
_NODES = 200_000  # of a YAML document with its aliases written out
_SAID = 200  # characters of a library's message

_Type = TypeVar("_Type")
_JSON_TYPES: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a flag",
}


def check_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file, symbolic links followed.

    Raises:
        UserError: It is missing, or is a folder, a FIFO, a socket or a device.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is {_kind(found.st_mode)}; expected a regular file.")
    return found


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """All of a regular file of at most ``limit`` bytes.

    Raises:
        UserError: It is not a regular file, cannot be read, or is longer.
    """
    check_regular(path)
    try:
        # Without blocking, because the checked file may have been replaced by another.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UserError(f"{path} is {_kind(os.fstat(handle).st_mode)}; expected a regular file.")
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if len(data) > limit:
        raise UserError(f"{path} is longer than {limit} bytes, which is the limit for a file of this kind.")
    return data


def read_text(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> str:
    """All of a regular file as UTF-8 text.

    Raises:
        UserError: It cannot be read, or is no UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}.") from None


# ----------------------------------------------------------------------------------------------------------------- JSON


def read_json(path: str | os.PathLike[str], *, infinities: bool = False, limit: int = JSON_LIMIT) -> dict[str, object]:
    """A JSON object from a file. With ``infinities`` numbers may be infinite or NaN, which some writers put into JSON.

    Raises:
        UserError: It cannot be read, or holds no JSON object.
    """
    value = parse_json(read_text(path, limit), str(path), infinities=infinities)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def check_json(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a JSON file for a library that will parse it itself.

    Raises:
        UserError: The file would take too much memory.
    """
    data = read_bytes(path, 4 * JSON_LIMIT)
    _check_values(data, str(path), 2 * _VALUES)
    return data


def _check_values(text: str | bytes, where: str, most: int = _VALUES) -> None:
    found = [text.count(m) for m in "[{,"] if isinstance(text, str) else [text.count(m) for m in (b"[", b"{", b",")]
    if sum(found) > most:
        raise UserError(f"{where} holds more than {most} values, which no configuration does.")


def parse_json(text: str | bytes, where: str, *, infinities: bool = False) -> Any:
    """The value of a JSON text; ``where`` names it in errors.

    Raises:
        UserError: It is not valid JSON.
    """
    _check_values(text, where)

    def constant(name: str) -> float:
        if infinities:
            return float(name.replace("Infinity", "inf"))
        raise UserError(f"{where} is not valid JSON: it holds {name}, which JSON does not have.")

    def number(digits: str) -> float:
        value = float(digits)
        return constant(digits[:40]) if math.isinf(value) and not infinities else value

    def integer(digits: str) -> int:
        if len(digits) > _DIGITS:
            raise UserError(f"{where} holds an integer of {len(digits)} digits; at most {_DIGITS} can be meant.")
        return int(digits)

    try:
        value = json.loads(text, parse_constant=constant, parse_float=number, parse_int=integer)
    except UserError:
        raise
    except RecursionError:
        _too_deep(where)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    _check_depth(value, where)
    return value


def json_lines(path: str | os.PathLike[str], *, limit: int = LINE_LIMIT) -> Iterator[dict[str, object]]:
    """The objects of a file with one on each line that is not blank. Only one line at a time is in memory.

    ``limit``: bytes that a line may have.

    Raises:
        UserError: A line is too long or holds no object.
    """
    check_regular(path)
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), 1):
            if len(line) > limit:
                raise UserError(f"{path}:{number}: the line is longer than {limit} bytes.")
            if line.strip():
                yield expect(parse_json(line, f"{path}:{number}", infinities=True), dict, f"{path}:{number}")


def _check_depth(value: object, where: str) -> None:
    level, depth = [value], 0
    while level:
        if depth > DEPTH:
            _too_deep(where)
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, (dict, list))
        ]
        depth += 1


def _too_deep(where: str) -> NoReturn:
    raise UserError(f"{where} is nested more than {DEPTH} deep, which no configuration is.")


def expect(value: object, kind: type[_Type] | tuple[type[_Type], ...], where: str) -> _Type:
    """``value``, if it is of that type (true is no number here).

    Raises:
        UserError: It is not; the message names the place and both types.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds):
        return value
    wanted = " or ".join(_JSON_TYPES.get(one, one.__name__) for one in kinds)
    raise UserError(f"{where}: expected {wanted}, found {_json_type(value)}.")


def entry(values: Mapping[str, object], key: str, kind: type[_Type], where: str) -> _Type:
    """``values[key]``, if it is there and of that type.

    Raises:
        UserError: The key is missing, or its value is of another type.
    """
    if key not in values:
        raise UserError(f"{where}: '{key}' is missing.")
    return expect(values[key], kind, f"{where}: {key}")


def _json_type(value: object) -> str:
    found = "true or false" if isinstance(value, bool) else _JSON_TYPES.get(type(value), "null")
    if isinstance(value, (str, int, float)):
        found += f" ({value if len(str(value)) <= 40 else str(value)[:40] + '…'})"
    return found


# ----------------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML with the words of YAML 1.2's core schema, in which a repeated key is an error.

    YAML 1.1, which pyyaml reads, takes ``off`` and ``no`` for switches, ``12:30`` for a number and ``1e-3`` for text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def check(self, root: yaml.Node) -> None:
        """Refuse a document whose aliases stand for too many values, and numbers as long as texts."""
        todo, seen = [root], 0
        while todo:
            node, seen = todo.pop(), seen + 1
            if seen > _NODES:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the aliases stand for more than {_NODES} values", root.start_mark
                )
            if isinstance(node, yaml.MappingNode):
                todo += [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                todo += node.value
            elif node.tag.endswith((":int", ":float", ":timestamp")) and len(node.value) > _DIGITS:
                what = f"a number of {len(node.value)} characters"
                raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = str(loader.construct_scalar(node))
    return int(digits[2:], {"0o": 8, "0x": 16}[digits[:2]]) if digits[:2] in ("0o", "0x") else int(digits)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_NUMBER = "-+.0123456789"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list(_NUMBER)),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list(_NUMBER),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(path: str | os.PathLike[str]) -> object:
    """The value of a YAML (or JSON) file.

    Raises:
        UserError: It cannot be read; the message names the place.
    """
    return parse_yaml(read_text(path, YAML_LIMIT), str(path))


def parse_yaml(text: str, where: str) -> object:
    """The value of a YAML text; ``where`` names it in errors.

    Raises:
        UserError: It is not valid YAML.
    """
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        loader.check(root)
        value = loader.construct_document(root)
    except RecursionError:
        _too_deep(where)
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, TypeError) as error:
        # pyyaml's constructors raise the last three for values that do not fit their tags.
        raise UserError(f"{where} is not valid YAML: {_yaml_line(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()
    _check_depth(value, where)
    return value


def _yaml_line(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())[:_SAID]
    return f"line {mark.line + 1}, column {mark.column + 1}: {str(getattr(error, 'problem', error))[:_SAID]}"


# ---------------------------------------------------------------------------------------------------------- safetensors


def check_safetensors(path: str | os.PathLike[str]) -> dict[str, object]:
    """The header of a safetensors file (dtype, shape and place of each tensor), if its length is possible.

    The library checks the tensors themselves. It maps the file, so false sizes cost no memory.

    Raises:
        UserError: It is cut off, or is no such file.
    """
    size = check_regular(path).st_size
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise UserError(f"{path} cannot be read as safetensors: it is cut off or no such file.")
            if length > HEADER_LIMIT:
                raise UserError(
                    f"{path} cannot be read as safetensors: its header is said to be {length} bytes long; at most "
                    f"{HEADER_LIMIT} are read."
                )
            header = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    found = parse_json(header, f"{path}: the header")
    return {key: value for key, value in expect(found, dict, f"{path}: the header").items() if key != "__metadata__"}
