"""Adapters that come and go while the server answers."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.kit.adapters import randomize
from tests.kit.serving import Running
from tests.kit.waiting import until
from tests.serve.conftest import make_target

import weft
from weft.generation.open import open_target
from weft.serve.candidates import folder_of
from weft.serve.envelope import ApiError

Real = Callable[..., AbstractContextManager[Running]]
METHODS: dict[str, Any] = {
    "lora": weft.LoraConfig(r=4),
    "prefix_tuning": weft.PrefixTuningConfig(num_virtual_tokens=3),
    "bottleneck": weft.BottleneckConfig(reduction_factor=8),
    "llama_pro": weft.LlamaProConfig(num_new_blocks=1),
}


@pytest.fixture(scope="module")
def folder(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of several methods; two of one method and name differ in their values."""
    root = tmp_path_factory.mktemp("adapters")
    target = make_target(tiny_llama_dir)
    for seed, (name, config) in enumerate(METHODS.items()):
        for version in ("one", "two"):
            made = f"{name}_{version}"
            tokenizer = target.base.tokenizer
            randomize(target.adapters.add(made, config, tokenizer=tokenizer), 2 * seed + (version == "two"), 0.3)
            target.adapters.save(made, root / version / name)
    target.adapters.save("judge", root / "judge")
    target.close()
    return root


@pytest.fixture(scope="module")
def server(serve_real: Real, folder: Path) -> Iterator[Running]:
    with serve_real(adapters_folder=folder) as found:
        yield found


def load(client: httpx.Client, name: str, path: str, **more: Any) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def unload(client: httpx.Client, name: str) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def ask(client: httpx.Client, model: str, tokens: int = 8) -> Any:
    body = {
        "model": model,
        "prompt": "What comes after one?",
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
    }
    return client.post("/v1/completions", json=body)


def said(client: httpx.Client, model: str, tokens: int = 8) -> str:
    found = ask(client, model, tokens)
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["text"]).rstrip("�")


def alone(tiny_llama_dir: Path, path: Path, tokens: int = 8) -> str:
    """The answer of an adapter's folder by itself, without a server."""
    with open_target(path, model=str(tiny_llama_dir), dtype="float32", device="cpu") as opened:
        ids = opened.prompt_ids("What comes after one?", raw=True)
        request = weft.Request(ids, opened.names[0], tokens)
        (done,) = weft.generate(opened.adapters, [request], stop_ids=())
        return str(opened.base.tokenizer.decode(done.ids, skip_special_tokens=True)).rstrip("�")


def test_they_are_not_loaded_unless_it_is_enabled(serve_real: Real) -> None:
    with serve_real() as server, server.client() as client:
        for found in (load(client, "a", "one/lora"), unload(client, "lora")):
            assert found.status_code == 403
            assert found.json()["error"]["code"] == "not_enabled"


@pytest.mark.parametrize("method", METHODS)
def test_a_name_with_other_weights_answers_anew(
    server: Running, folder: Path, tiny_llama_dir: Path, method: str
) -> None:
    wanted = {version: alone(tiny_llama_dir, folder / version / method) for version in ("one", "two")}
    assert wanted["one"] != wanted["two"]
    with server.client() as client:
        assert ask(client, "mine").status_code == 404
        first = load(client, "mine", f"one/{method}").json()
        assert first["status"] == "loaded"
        assert said(client, "mine") == wanted["one"]
        again = load(client, "mine", f"one/{method}").json()
        assert (again["status"], again["sha256"]) == ("unchanged", first["sha256"])
        refused = load(client, "mine", f"two/{method}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "name_taken")
        assert said(client, "mine") == wanted["one"]
        second = load(client, "mine", f"two/{method}", load_inplace=True).json()
        assert second["status"] == "replaced"
        assert second["sha256"] != first["sha256"]
        assert said(client, "mine") == wanted["two"]
        card = client.get("/v1/models/mine").json()
        assert (card["sha256"], card["parent"], card["root"]) == (second["sha256"], "tiny", f"two/{method}")
        assert unload(client, "mine").json()["status"] == "unloaded"
        assert load(client, "mine", f"one/{method}").json()["sha256"] == first["sha256"]
        assert said(client, "mine") == wanted["one"]
        assert unload(client, "mine").status_code == 200
        assert ask(client, "mine").json()["error"]["code"] == "model_not_found"
        assert unload(client, "mine").status_code == 404
    assert until(lambda: server.service.target.adapters.names == ["lora", "prefix", "judge"])


def test_answers_that_are_being_written_end_with_the_weights_they_began_with(server: Running, folder: Path) -> None:
    with server.client() as client:
        load(client, "mine", "one/lora")
        whole = said(client, "mine", 60)
        body = {"model": "mine", "prompt": "What comes after one?", "temperature": 0, "max_tokens": 60,
                "ignore_eos": True, "stream": True}  # fmt: skip
        with client.stream("POST", "/v1/completions", json=body) as stream, server.client() as other:
            lines = stream.iter_lines()
            text = [next(lines)]
            assert load(other, "mine", "two/lora", load_inplace=True).json()["status"] == "replaced"
            changed = said(other, "mine", 60)
            text += lines
        pieces = [json.loads(line[6:]) for line in text if line.startswith("data: {")]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole
        assert changed != whole
        assert unload(client, "mine").status_code == 200
    assert until(lambda: server.service.target.adapters.names == ["lora", "prefix", "judge"])


def test_a_form_is_kept_by_the_engine(server: Running) -> None:
    """The model is random, so only the grammar can make these answers."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with server.client() as client:
        chat = {"model": "lora", "messages": [{"role": "user", "content": "a"}], "max_tokens": 200, "temperature": 0}
        found = client.post("/v1/chat/completions", json={**chat, "response_format": form}).json()
        assert found["choices"][0]["finish_reason"] == "stop"
        assert json.loads(found["choices"][0]["message"]["content"])["n"] <= 9
        for outputs, wanted in (({"choice": ["yes", "no"]}, {"yes", "no"}), ({"regex": "a{3}"}, {"aaa"})):
            text = {"model": "tiny", "prompt": "a", "max_tokens": 20, "structured_outputs": outputs}
            assert client.post("/v1/completions", json=text).json()["choices"][0]["text"] in wanted
        bad = client.post("/v1/chat/completions", json={**chat, "response_format": {**form, "json_schema": {
            "name": "n", "schema": {"type": "string", "pattern": "(?=a)"}}}})  # fmt: skip
        assert bad.status_code == 400, bad.text


def test_a_classifier_is_loaded_and_asked(server: Running) -> None:
    with server.client() as client:
        load(client, "other_judge", "judge")
        found = client.post("/classify", json={"model": "other_judge", "input": ["one two", "x"]}).json()
        same = client.post("/classify", json={"model": "judge", "input": ["one two", "x"]}).json()
        assert found["data"] == same["data"]
        assert [abs(sum(one["probs"]) - 1) < 1e-5 for one in found["data"]] == [True, True]
        for model in ("tiny", "lora"):
            refused = client.post("/classify", json={"model": model, "input": "a"})
            assert refused.json()["error"]["code"] == "no_classes"
        unload(client, "other_judge")


def test_an_adapter_of_another_base_or_tokenizer_is_refused(server: Running, folder: Path) -> None:
    def changed(section: str, key: str, value: object) -> httpx.Response:
        copy = folder / "changed"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "one" / "lora", copy)
        own = json.loads((copy / "weft.json").read_text())
        own.setdefault(section, {})[key] = value
        (copy / "weft.json").write_text(json.dumps(own))
        with server.client() as client:
            return load(client, "mine", "changed")

    facts = {"sha256": "ab" * 32, "kind": "Fast", "tokens": 7}
    for found, names in (
        (changed("base", "sha256_of_small_tensors", "cd" * 32), ("another base", "cdcdcdcdcdcd…", "instead of")),
        (changed("data", "tokenizer", facts), ("another tokenizer", "abababababab…", "SHA-256 here")),
    ):
        assert found.status_code == 400
        assert found.json()["error"]["code"] == "adapter_refused"
        for name in names:
            assert name in found.json()["error"]["message"]
        assert str(folder) not in found.text
    assert "mine" not in [one.name for one in server.service.registry.models()]


def test_damaged_folders_are_refused_and_leave_nothing(server: Running, folder: Path) -> None:
    bad = folder / "bad"
    before = server.service.target.adapters.names
    for damage in ("cut", "missing", "pickle", "other_shape"):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(folder / "one" / "lora", bad)
        weights = bad / "adapter_model.safetensors"
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:-40])
        elif damage == "missing":
            weights.unlink()
        elif damage == "pickle":
            weights.rename(bad / "adapter_model.bin")
        else:
            (bad / "adapter_config.json").write_text(
                (bad / "adapter_config.json").read_text().replace('"r": 4', '"r": 5')
            )
        with server.client() as client:
            found = load(client, "mine", "bad")
        assert found.status_code == 400, damage
        assert server.service.target.adapters.names == before
    shutil.rmtree(bad)


NAMES = ["..", "../x", "one/../../x", "/etc", "/etc/passwd", "~", "~root", "a\0b", "one/lora\0", "\\\\host\\x", "C:\\x",
         ".", "./..", "one//../..", "", " ", "one/lora/adapter_model.safetensors", "link", "link/lora", "one/linked",
         "inside_link", "fifo", "．．/x", "one/lora/../../../etc", "‥/x"]  # fmt: skip


def test_no_name_leads_outside(server: Running, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(folder / "one" / "lora", outside / "lora")
    for link, to in (("link", outside), ("one/linked", outside / "lora")):
        (folder / link).symlink_to(to)
    shutil.copytree(folder / "one" / "lora", folder / "inside_link")
    (folder / "inside_link" / "adapter_model.safetensors").unlink()
    (folder / "inside_link" / "adapter_model.safetensors").symlink_to(outside / "lora" / "adapter_model.safetensors")
    opened: list[str] = []
    watching = threading.Event()
    root = str(folder.resolve())

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and watching.is_set() and isinstance(args[0], (str, bytes)):
            name = args[0] if isinstance(args[0], str) else args[0].decode()
            if name.startswith((str(outside), "/etc")) or (name.startswith(root) and "link" in name):
                opened.append(name)

    sys.addaudithook(hook)
    watching.set()
    try:
        with server.client() as client:
            for name in NAMES:
                found = load(client, "mine", name)
                assert found.status_code == 400, (name, found.text)
            for name in ("../x", "a/b", "", ".hidden", "a\0", "a b", "x" * 101, "<script>"):
                assert load(client, name, "one/lora").status_code == 400, name
        for name in [f"{a}{b}{c}" for a in NAMES for b in ("/", "/../", "//") for c in NAMES]:
            try:
                found_folder = folder_of(folder, name)
            except ApiError:
                continue
            assert found_folder.resolve().is_relative_to(folder.resolve())
    finally:
        watching.clear()
    assert opened == []
    for link in ("link", "one/linked"):
        (folder / link).unlink()
    shutil.rmtree(folder / "inside_link")


def test_a_mixed_load_answers_as_each_alone_while_adapters_come_and_go(server: Running, folder: Path) -> None:
    names = [f"{method}-{version}" for method in METHODS for version in ("one", "two")]
    with server.client() as client:
        for name in names:
            load(client, name, "{1}/{0}".format(*name.rsplit("-", 1)))
        wanted = {name: said(client, name, 6) for name in (*names, "tiny")}
        wrong: list[str] = []

        def asks(first: int) -> None:
            with server.client() as own:
                for number in range(first, first + 12):
                    name = [*wanted][number % len(wanted)]
                    if said(own, name, 6) != wanted[name]:
                        wrong.append(name)

        def comes_and_goes() -> None:
            with server.client() as own:
                for number in range(6):
                    load(own, "guest", f"{('one', 'two')[number % 2]}/lora")
                    answer = said(own, "guest", 6)
                    if answer != wanted[f"lora-{('one', 'two')[number % 2]}"]:
                        wrong.append("guest")
                    unload(own, "guest")

        threads = [threading.Thread(target=asks, args=(n,)) for n in range(8)]
        threads.append(threading.Thread(target=comes_and_goes))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        for name in names:
            unload(client, name)
    assert server.drained()


@pytest.mark.slow
def test_memory_is_flat_over_200_loads(server: Running) -> None:
    process, sizes = psutil.Process(), []
    with server.client() as client:
        for number in range(240):
            assert load(client, "guest", f"{('one', 'two')[number % 2]}/{[*METHODS][number % 4]}").status_code == 200
            said(client, "guest", 4)
            assert unload(client, "guest").status_code == 200
            if number in (40, 239):
                sizes.append(process.memory_info().rss)
    assert sizes[1] < 1.05 * sizes[0], sizes
    assert server.service.target.adapters.names == ["lora", "prefix", "judge"]
