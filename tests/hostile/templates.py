"""Chat templates that do not end, fill the memory or want out, in every place that a template comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from tests.data.test_sandbox import BOMBS, ESCAPES
from tests.hostile.kit import Case, Place, ask, edit, train

SOME = (
    "product of text", "tower", "nested ranges", "doubling by tilde", "doubling by a block", "nested objects",
    "many long strings", "center", "str.format", "indent", "branching", "recursion", "deep", "long", "output",
)  # fmt: skip


def _jinja_file(place: Place, text: str) -> list[Any]:
    folder = place.model()
    (folder / "chat_template.jinja").write_text(text)
    return ask(folder)


def _tokenizer_config(place: Place, text: str) -> list[Any]:
    folder = place.model()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", {"chat_template": text})
    return ask(folder)


def _adapter(place: Place, text: str) -> list[Any]:
    folder = place.adapter()
    (folder / "weft.json").unlink()
    for path in (place.good.run / "tokenizer").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(text)
    return ask(folder)


def _own(place: Place, text: str) -> list[Any]:
    folder = place.adapter()
    edit(folder / "weft.json", {"data.chat_template": text, "data.template_from": "configuration"})
    return ask(folder)


def _run(place: Place, text: str) -> list[Any]:
    folder = place.unfinished()
    edit(folder / "run.json", {"config.chat_template": text})
    return ask(folder)


def _yaml(place: Place, text: str) -> list[Any]:
    path = place.folder / "run.yaml"
    settings = {"model": str(place.good.model), "data": str(place.good.data), "method": "lora", "chat_template": text}
    path.write_text(json.dumps(settings))
    return ["train", path, "steps=1"]


def _preview(place: Place, text: str) -> list[Any]:
    return ["preview", *_yaml(place, text)[1:2]]


def _trained(place: Place, text: str) -> list[Any]:
    folder = place.model()
    (folder / "chat_template.jinja").write_text(text)
    return train(folder, place.good.data)


PLACES: dict[str, Callable[[Place, str], list[Any]]] = {
    "chat_template.jinja of a model": _jinja_file,
    "tokenizer_config.json of a model": _tokenizer_config,
    "an adapter's tokenizer": _adapter,
    "weft.json of an adapter": _own,
    "run.json": _run,
    "YAML": _yaml,
    "YAML, previewed": _preview,
    "a model, trained on": _trained,
}


def _cases() -> Iterator[Case]:
    for number, (where, build) in enumerate(PLACES.items()):
        names = BOMBS if not number else SOME
        for name in names:
            yield Case(f"templates in {where}", name,
                       lambda place, build=build, name=name: build(place, BOMBS[name]),
                       codes=(1, 2) if "previewed" in where else (2,))  # fmt: skip
    for number, text in enumerate(ESCAPES):
        yield Case("templates that want out", f"{number}: {text[:40]}",
                   lambda place, text=text: _jinja_file(place, text))  # fmt: skip
    for where in ("weft.json", "run.json"):

        def elsewhere(place: Place, where: str = where) -> list[Any]:
            secret = place.folder.parent / "secret.jinja"
            secret.write_text("{{ messages[0].content }}")
            return (_own if where == "weft.json" else _run)(place, str(secret))

        yield Case("templates that want out", f"{where} names a file elsewhere", elsewhere)


CASES: list[Case] = list(_cases())
