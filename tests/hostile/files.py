"""Every file that is read, damaged in every way: not a file, too deep, too long, of another type, cut off."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile.kit import Case, Place, ask, edit, train

BIG = 70 << 20


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    where = os.getcwd()
    os.chdir(path.parent)  # the address is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(where)


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def _write(content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    return make


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


def _long(path: Path) -> None:
    """Many small values, which take far more memory than bytes."""
    path.unlink(missing_ok=True)
    path.write_bytes(b'{"a": [' + b"[]," * 8_000_000 + b"1]}")


def _sparse(path: Path) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(1 << 36)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a FIFO": _fifo,
    "a socket": _socket,
    "a folder": _folder,
    "a link to itself": lambda path: _link(path.name)(path),
    "a link to /dev/zero": _link("/dev/zero"),
    "empty": _write(b""),
    "cut off": _cut,
    "an array": _write(b"[1, 2]"),
    "a number": _write(b"7"),
    "null": _write(b"null"),
    "100,000 deep": _write(b'{"a": ' * 100_000 + b"1" + b"}" * 100_000),
    "arrays 100,000 deep": _write(b"[" * 100_000),
    "5,000 digits": _write(b'{"hidden_size": ' + b"9" * 5000 + b', "num": ' + b"9" * 5000 + b"}"),
    "not UTF-8": _write(b'{"a": "\xff\xfe"}'),
    "8,000,000 values": _long,
    "64 GiB of nothing": _sparse,
}
# file, the command that reads it, and which of the folder's kinds it is in
PLACES: dict[str, tuple[str, Callable[[Place], tuple[Path, list[Any]]]]] = {}


def _place(kind: str, name: str) -> Callable[[Callable[[Place], tuple[Path, list[Any]]]], None]:
    def put(build: Callable[[Place], tuple[Path, list[Any]]]) -> None:
        PLACES[f"{name} of {kind}"] = (name, build)

    return put


for _name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
    _place("a model", _name)(lambda place, name=_name: ((m := place.model()) / name, ask(m)))
_place("a model", "model.safetensors")(lambda place: ((m := place.model()) / "model.safetensors", ask(m)))
_place("a model", "config.json, trained on")(
    lambda place: ((m := place.model()) / "config.json", train(m, place.good.data))
)
for _name in ("adapter_config.json", "weft.json", "adapter_model.safetensors"):
    _place("an adapter", _name)(lambda place, name=_name: ((a := place.adapter()) / name, ask(a)))
_place("a run", "run.json")(lambda place: ((r := place.run()) / "run.json", ask(r)))
_place("a run", "tokenizer_config.json")(lambda place: ((r := place.run()) / "tokenizer/tokenizer_config.json", ask(r)))
_place("a run", "tokenizer.json")(lambda place: ((r := place.run()) / "tokenizer/tokenizer.json", ask(r)))
_place("a run", "weft.json")(lambda place: ((r := place.run()) / "adapters/lora/weft.json", ask(r)))


def _index(place: Place) -> tuple[Path, list[Any]]:
    folder = place.model()
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    return folder / "model.safetensors.index.json", ask(folder)


_place("a model", "model.safetensors.index.json")(_index)

_TEXTS = ("an array", "a number", "null", "5,000 digits", "not UTF-8", "8,000,000 values")


def _damaged() -> Iterator[Case]:
    for where, (_, build) in PLACES.items():
        for what, damage in DAMAGE.items():
            if where.startswith(("adapter_model", "model.safetensors of")) and what in _TEXTS:
                continue

            def make(place: Place, build: Any = build, damage: Any = damage) -> list[Any]:
                path, words = build(place)
                damage(path)
                return words  # type: ignore[no-any-return]

            yield Case(f"damaged {where}", what, make)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _checkpoint(name: str, damage: Callable[[Path], None], *, honest: bool = False) -> Callable[[Place], list[Any]]:
    """Of an unfinished run; ``honest``: the manifest is made to fit."""

    def build(place: Place) -> list[Any]:
        run = place.unfinished()
        for folder in (run / "checkpoints").glob("step-*"):
            damage(folder / name)
            if honest:
                import hashlib

                path = folder / "manifest.json"
                digests = json.loads(path.read_text())
                digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
                path.write_text(json.dumps(digests))
        return ask(run)

    return build


def _checkpoints() -> Iterator[Case]:
    for what, damage in DAMAGE.items():
        yield Case("damaged manifest.json of a checkpoint", what, _checkpoint("manifest.json", damage))
    for name, content in {
        "a path": b'{"../../../../../../etc/passwd": "0"}',
        "numbers": b'{"state.json": 7}',
        "a device": b'{"/dev/zero": "0"}',
    }.items():
        yield Case("damaged manifest.json of a checkpoint", name, _checkpoint("manifest.json", _write(content)))
    for name in ("100,000 deep", "an array", "empty", "8,000,000 values"):
        build = _checkpoint("state.json", DAMAGE[name], honest=True)
        yield Case("damaged state.json of a checkpoint", name, build)
    for name in ("100,000 deep", "an array", "a FIFO", "not UTF-8", "5,000 digits", "a folder", "a link to /dev/zero"):

        def metrics(place: Place, name: str = name) -> list[Any]:
            run = place.run()
            DAMAGE[name](run / "metrics.jsonl")
            return ["train", run, "--resume", "-q"]

        yield Case("damaged metrics.jsonl of a run", name, metrics)


# ---------------------------------------------------------------------------------------------------------- wrong types

TYPES: dict[str, dict[str, Any]] = {
    "weft.json": {
        "method": [[], 7, {}, None], "config": [[], 7, None, "x"], "labels": [7, [[]], {}, [{}]],
        "parts": [7, {}, [7], ["../.."], ["/etc"], []], "data": [7, [], "x"], "base": [7, [], "x"],
        "config.r": [[], {}, "x", -1, 1.5, 10**12], "config.target_modules": [7, {}, [7], "", "(((", []],
        "config.lora_alpha": [[], {}, "x"], "data.chat_template": [7, [], {"default": 7}],
        "data.template_kwargs": [7, [], "x"], "data.template_from": [7, "x"], "base.quantization": [7, [], "x"],
    },
    "run.json": {
        "config": [[], 7, None, "x"], "config.model": [7, [], None], "config.jobs": [7, {}, [7], [[]], []],
        "config.dtype": [7, [], "x"], "config.shape": [7, [], "x"], "config.max_length": [[], "x", -1],
        "config.chat_template": [7, [], {}], "config.template_kwargs": [7, [], "x"],
        "base.sha256_of_small_tensors": [7, [], {}], "config.quantization": [7, [], "x"],
    },
    "adapter_config.json": {
        "r": [[], {}, "x", -1, 0, 10**12], "lora_alpha": [[], {}, "x"], "target_modules": [7, {}, [7], "((("],
        "rank_pattern": [7, [], {"q_proj": "x"}, {"q_proj": -1}, {"(": 4}], "bias": [7, [], "x"],
        "modules_to_save": [7, {}, "x"], "peft_type": [7, None, {}], "layers_to_transform": ["x", {}, ["x"]],
        "use_dora": ["x", 7], "task_type": [],
    },
}  # fmt: skip


def _types() -> Iterator[Case]:
    for file, entries in TYPES.items():
        for key, values in entries.items():
            for value in values:

                def build(place: Place, file: str = file, key: str = key, value: Any = value) -> list[Any]:
                    folder = place.run() if file == "run.json" else place.adapter()
                    if file == "adapter_config.json":
                        (folder / "weft.json").unlink()
                    edit(folder / file, {key: value})
                    return ask(folder)

                yield Case(f"wrong types in {file}", f"{key} = {json.dumps(value)[:30]}", build)


# ---------------------------------------------------------------------------------------------------------- safetensors


def _header(entries: Any, *, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(**entries: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **entries}}


SAFETENSORS = {
    "length 2**63": _header(b"{}", length=1 << 63),
    "length 10**9": _header(b"{}", length=10**9),
    "length beyond the end": _header(b"{}", length=70),
    "three bytes": b"abc",
    "header is an array": _header([1]),
    "header is deep": _header(b'{"a": ' * 50_000 + b"1" + b"}" * 50_000),
    "header is no text": _header(b"\xff\xfe\x00"),
    "offsets turned": _header(_tensor(data_offsets=[64, 0])),
    "offsets beyond the end": _header(_tensor(data_offsets=[0, 1 << 40])),
    "offsets negative": _header(_tensor(data_offsets=[-64, 0])),
    "shape of 2**70": _header(_tensor(shape=[1 << 35, 1 << 35])),
    "shape negative": _header(_tensor(shape=[-4, -4])),
    "shape of words": _header(_tensor(shape=["4", 4])),
    "dtype unknown": _header(_tensor(dtype="X32")),
    "overlapping": _header({**_tensor(), "b": _tensor()["a"]}),
    "a hole": _header(_tensor(shape=[2, 4], data_offsets=[32, 64])),
    "other tensors": _header(_tensor()),
    "a zip": b"PK\x03\x04" + bytes(100),
}


def _safetensors() -> Iterator[Case]:
    for name, content in SAFETENSORS.items():
        for where in ("model", "adapter"):

            def build(place: Place, where: str = where, content: bytes = content) -> list[Any]:
                folder = getattr(place, where)()
                _write(content)(folder / ("model.safetensors" if where == "model" else "adapter_model.safetensors"))
                return ask(folder)

            yield Case(f"safetensors of a {where} that lie", name, build)
    for name, value in {
        "a path": "../../../../etc/passwd", "absolute": "/etc/passwd", "a number": 7, "missing": "other.safetensors",
        "a folder": "..", "a FIFO": "fifo.safetensors",
    }.items():  # fmt: skip

        def index(place: Place, value: Any = value) -> list[Any]:
            path, words = _index(place)
            _fifo(path.parent / "fifo.safetensors")
            path.write_text(json.dumps({"weight_map": {"model.norm.weight": value}}))
            return words

        yield Case("an index that leads elsewhere", name, index)


# ----------------------------------------------------------------------------------------------------------------- data

_ROW = b'{"instruction": "a", "output": "%s"}\n'


def _bomb(pack: Callable[[bytes], bytes]) -> bytes:
    return pack(_ROW % (b"x" * (200 << 20)))


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


DATA: dict[str, tuple[str, Callable[[], bytes]]] = {
    "bz2 bomb": ("d.jsonl.bz2", lambda: _bomb(bz2.compress)),
    "gz bomb": ("d.jsonl.gz", lambda: _bomb(lambda data: gzip.compress(data, 1))),
    "xz bomb": ("d.jsonl.xz", lambda: _bomb(lambda data: lzma.compress(data, preset=0))),
    "zst bomb": ("d.jsonl.zst", lambda: _bomb(_zstd)),
    "a line of 30 MB": ("d.jsonl", lambda: _ROW % (b"x" * (30 << 20))),
    "a line of 30 MB without an end": ("d.jsonl", lambda: b'{"instruction": "' + b"x" * (30 << 20)),
    "a line of 30 MB, text": ("d.txt", lambda: b"x " * (15 << 20)),
    "a cell of 30 MB": ("d.csv", lambda: b'instruction,output\na,"' + b"x" * (30 << 20) + b'"\n'),
    "a record of 30 MB": ("d.json", lambda: b'[{"instruction": "a", "output": "' + b"x" * (30 << 20) + b'"}]'),
    "an open quote": ("d.csv", lambda: b'instruction,output\n"' + b"a,b\n" * 2000),
    "100,000 deep": ("d.jsonl", lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "100,000 deep, json": ("d.json", lambda: b"[" * 100_000),
    "5,000 digits": ("d.jsonl", lambda: b'{"instruction": ' + b"9" * 5000 + b', "output": "a"}\n'),
    "NaN": ("d.jsonl", lambda: b'{"instruction": NaN, "output": "a"}\n'),
    "empty": ("d.jsonl", lambda: b""),
    "zeros": ("d.jsonl", lambda: bytes(1 << 20)),
    "binary": ("d.jsonl", lambda: os.urandom(1 << 16)),
    "a zip": ("d.jsonl", lambda: b"PK\x03\x04" + bytes(1000)),
    "a zip by name": ("d.zip", lambda: b"PK\x03\x04" + bytes(1000)),
    "a pickle": ("d.pkl", lambda: b"\x80\x04."),
    "cut gz": ("d.jsonl.gz", lambda: gzip.compress(_ROW % b"x" * 9)[:30]),
    "no parquet": ("d.parquet", lambda: b"PAR1" + os.urandom(1000) + b"PAR1"),
    "no arrow": ("d.arrow", lambda: b"ARROW1\0\0" + os.urandom(1000)),
    "xz that wants 4 GiB": ("d.jsonl.xz", lambda: lzma.compress(b"a", format=lzma.FORMAT_XZ, filters=[
        {"id": lzma.FILTER_LZMA2, "dict_size": (1 << 30), "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3, "nice_len": 8}])),
    "8,000,000 values": ("d.jsonl", lambda: b'{"instruction": [' + b"[]," * 8_000_000 + b'1], "output": "a"}\n'),
}  # fmt: skip


def _data() -> Iterator[Case]:
    for name, (file, content) in DATA.items():
        yield Case("data", name, lambda place, file=file, content=content: train(
            "tiny-llama", place.data(file, content())))  # fmt: skip
    for name in ("a FIFO", "a socket", "a link to itself", "a link to /dev/zero"):

        def special(place: Place, name: str = name) -> list[Any]:
            DAMAGE[name](place.folder / "d.jsonl")
            return train("tiny-llama", place.folder / "d.jsonl")

        yield Case("data", name, special)

    def saved(place: Place) -> list[Any]:
        folder = place.folder / "saved"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../../../etc/passwd"}]}))
        (folder / "dataset_info.json").write_text("{}")
        return train("tiny-llama", folder)

    yield Case("data", "a saved data set that leads elsewhere", saved)

    def state(place: Place) -> list[Any]:
        folder = place.folder / "saved"
        folder.mkdir()
        DAMAGE["100,000 deep"](folder / "state.json")
        return train("tiny-llama", folder)

    yield Case("data", "a saved data set, 100,000 deep", state)

    def questions(place: Place) -> list[Any]:
        _fifo(place.folder / "in.jsonl")
        return ["generate", place.good.model, "--input", place.folder / "in.jsonl"]

    yield Case("data", "questions from a FIFO", questions)

    def template(place: Place) -> list[Any]:
        _fifo(place.folder / "t.jinja")
        return [*ask(place.good.model), "--chat-template", place.folder / "t.jinja"]

    yield Case("data", "a chat template from a FIFO", template)

    def bomb(place: Place) -> list[Any]:
        with zipfile.ZipFile(place.folder / "d.json", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", bytes(100 << 20))
        return train("tiny-llama", place.folder / "d.json")

    yield Case("data", "a zip bomb", bomb)


# ----------------------------------------------------------------------------------------------------------------- YAML

YAML: dict[str, Callable[[], bytes]] = {
    "aliases": lambda: (
        b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12))
    ),
    "merged aliases": lambda: (
        b"a0: &a0 {x: 1}\n"
        + b"".join(b"a%d: &a%d {<<: [%s]}\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12))
    ),
    "an alias of itself": lambda: b"model: &a [*a]\n",
    "100,000 deep": lambda: b"a: " + b"[" * 100_000,
    "100,000 deep, block": lambda: b"".join(b" " * i + b"a:\n" for i in range(1200)),
    "5,000 digits": lambda: b"seed: " + b"9" * 5000 + b"\n",
    "base 60": lambda: b"seed: 1" + b":59" * 100_000 + b"\n",
    "an infinite number": lambda: b"model: tiny-llama\ndata: x.jsonl\nmethod: lora\nlearning_rate: .inf\n",
    "not UTF-8": lambda: b"model: \xff\xfe\n",
    "NUL": lambda: b"model: a\0b\n",
    "3 MB": lambda: b"# " + b"x" * (3 << 20),
    "a list as a key": lambda: b"? [a, b]\n: 1\n",
    "an object as a key": lambda: b"? {a: b}\n: 1\n",
    "a date": lambda: b"model: 2001-99-99\n",
    "a binary": lambda: b"model: !!binary '!'\n",
    "a set": lambda: b"!!set {a, b}\n",
    "many anchors": lambda: b"".join(b"a%d: &b%d 1\n" % (i, i) for i in range(50_000)),
}


def _yaml() -> Iterator[Case]:
    for name, content in YAML.items():
        yield Case("YAML", name, lambda place, content=content: ["train", place.data("run.yaml", content())])
    for what in ("a FIFO", "a socket", "a folder", "a link to itself", "a link to /dev/zero", "64 GiB of nothing"):

        def special(place: Place, what: str = what) -> list[Any]:
            DAMAGE[what](place.folder / "run.yaml")
            return ["train", place.folder / "run.yaml"]

        yield Case("YAML", what, special)


CASES: list[Case] = [*_damaged(), *_checkpoints(), *_types(), *_safetensors(), *_data(), *_yaml()]
