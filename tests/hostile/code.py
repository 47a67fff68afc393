"""Files that ask for code: Python beside a model, kernels of a hub, classes of other kinds, pickles, YAML's tags."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.hostile.kit import CODE, Case, Place, ask, edit, train

MODULE = "modeling_weft_canary"
OWN = {
    "AutoConfig": f"{MODULE}.Config",
    "AutoModelForCausalLM": f"{MODULE}.Model",
    "AutoModel": f"{MODULE}.Model",
    "AutoTokenizer": [f"{MODULE}.Tokenizer", f"{MODULE}.Tokenizer"],
    "AutoProcessor": f"{MODULE}.Processor",
}
HUB = {key: f"somebody/else--{MODULE}.X" for key in ("AutoConfig", "AutoModelForCausalLM")}


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch weft_canary.sh",)


def _with_code(folder: Path) -> Path:
    for name in (MODULE, "configuration_weft_canary", "tokenization_weft_canary", "weft_canary", "__init__", "setup"):
        (folder / f"{name}.py").write_text(CODE)
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    return folder


CONFIGS: dict[str, Mapping[str, Any]] = {
    "auto_map, unknown type": {"auto_map": OWN, "model_type": "weft_canary"},
    "auto_map, no type": {"auto_map": OWN, "model_type": ...},
    "auto_map to a hub": {"auto_map": HUB, "model_type": "weft_canary"},
    "auto_map in a part": {"text_config": {"auto_map": OWN, "model_type": "llama"}},
    "auto_map, two deep": {"a.b": {"auto_map": OWN}},
    "auto_map, for a type without a head": {"auto_map": OWN, "model_type": "vit"},
    "attention from a hub": {"attn_implementation": "kernels-community/flash-attn"},
    "attention from a hub, private": {"_attn_implementation": "somebody/kernel"},
    "attention from a hub, internal": {"_attn_implementation_internal": "somebody/kernel"},
    "attention from a hub, in a part": {"text_config": {"attn_implementation": "somebody/kernel:f"}},
    "attention from a hub, by part": {"attn_implementation": {"": "somebody/kernel@main:f"}},
    "attention, paged": {"attn_implementation": "paged|somebody/kernel"},
    "attention is a number": {"attn_implementation": 3},
    "experts from a hub": {"experts_implementation": "somebody/kernel"},
    "use_kernels": {"use_kernels": True},
    "kernel_config": {"kernel_config": {"RMSNorm": "somebody/kernel:f"}},
    "trust_remote_code": {"trust_remote_code": True, "auto_map": OWN, "model_type": "weft_canary"},
    "custom_generate": {"custom_generate": "./custom_generate"},
    "weights elsewhere": {"transformers_weights": "../../../../etc/passwd"},
    "tokenizer class is a loader": {"tokenizer_class": "AutoModelForCausalLM"},
    "tokenizer class is a pipeline": {"tokenizer_class": "pipeline"},
    "tokenizer class is a module": {"tokenizer_class": "os.system"},
    **{
        f"quantised by {name}": {"quantization_config": {"quant_method": name, "bits": 4}}
        for name in ("gptq", "awq", "mxfp4", "fp8", "hqq", "torchao", "quanto", "compressed-tensors", "metal", "x", 3)
    },
    "quantised by a list": {"quantization_config": ["gptq"]},
}
TOKENIZERS: dict[str, Mapping[str, Any]] = {
    "auto_map, no class": {"auto_map": OWN, "tokenizer_class": ...},
    "auto_map, unknown class": {"auto_map": {"AutoTokenizer": OWN["AutoTokenizer"]}, "tokenizer_class": "Canary"},
    "auto_map, a list": {"auto_map": OWN["AutoTokenizer"], "tokenizer_class": "Canary"},
    "auto_map to a hub": {"auto_map": {"AutoTokenizer": ["a/b--x.Y", None]}, "tokenizer_class": "Canary"},
    "class is a model": {"tokenizer_class": "AutoModelForCausalLM", "auto_map": OWN},
    "class is AutoTokenizer": {"tokenizer_class": "AutoTokenizer"},
    "class is a trainer": {"tokenizer_class": "Trainer"},
    "class is a function": {"tokenizer_class": "pipeline"},
    "class is a module": {"tokenizer_class": "utils"},
    "class is a list": {"tokenizer_class": ["LlamaTokenizer"]},
    "file elsewhere": {"tokenizer_file": "/etc/passwd"},
    "vocabulary elsewhere": {"vocab_file": "../../../../etc/passwd"},
    "files elsewhere": {"fast_tokenizer_files": ["tokenizer.../../../../etc/passwd.json", "/etc/passwd"]},
    "gguf": {"gguf_file": "/etc/passwd"},
    "object": {"tokenizer_object": "x"},
    "inputs": {"init_inputs": ["/etc/passwd"]},
    "added tokens are no numbers": {"added_tokens_decoder": {"9" * 30: {"content": "a"}}},
    "added tokens are no tokens": {"added_tokens_decoder": {"5": 7}},
}


def _spoil(name: str, changes: Mapping[str, Any], where: str) -> Callable[[Place], list[Any]]:
    def build(place: Place) -> list[Any]:
        folder = getattr(place, where)()
        _with_code(folder)
        if name == "tokenizer_config.json" and where == "adapter":
            for path in (place.good.run / "tokenizer").iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
        target = folder / "tokenizer" / name if where == "run" else folder / name
        edit(target, changes)
        return ask(folder)

    return build


def _json_cases() -> Iterator[Case]:
    for what, changes in CONFIGS.items():
        yield Case("code in config.json", what, _spoil("config.json", changes, "model"))
    for what, changes in TOKENIZERS.items():
        for where in ("model", "adapter", "run"):
            yield Case(f"code in tokenizer_config.json of a {where}", what,
                       _spoil("tokenizer_config.json", changes, where))  # fmt: skip
    for what in ("auto_map, unknown type", "attention from a hub"):
        changes = CONFIGS[what]

        def build(place: Place, changes: Mapping[str, Any] = changes) -> list[Any]:
            folder = _with_code(place.model())
            edit(folder / "config.json", changes)
            return train(folder, place.good.data)

        yield Case("code in config.json", f"{what}, in training", build)

        def tiny(place: Place, changes: Mapping[str, Any] = changes) -> list[Any]:
            folder = _with_code(place.model())
            edit(folder / "config.json", changes)
            return train(folder, place.good.data, "--shape", "tiny")

        yield Case("code in config.json", f"{what}, shape: tiny", tiny)


def _generation(place: Place) -> list[Any]:
    folder = _with_code(place.model())
    edit(folder / "generation_config.json", {"custom_generate": "./custom_generate"})
    return ask(folder)


def _both(place: Place) -> list[Any]:
    folder = place.model()
    for path in place.adapter().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit(folder / "adapter_config.json", {"base_model_name_or_path": "/etc"})
    return train(folder, place.good.data)


ADAPTERS: dict[str, Mapping[str, Any]] = {
    "auto_mapping": {"peft_type": "WEFT", "auto_mapping": {"base_model_class": "X", "parent_library": "weft_canary"}},
    "base is the disk": {"base_model_name_or_path": "/etc"},
    "base is above": {"base_model_name_or_path": "../../../../../../etc/passwd"},
    "base is an address": {"base_model_name_or_path": "http://169.254.169.254/latest/meta-data"},
    "base is a share": {"base_model_name_or_path": "\\\\host\\share"},
    "base is a hub's": {"base_model_name_or_path": "somebody/weft-canary"},
    "base is a list": {"base_model_name_or_path": ["/etc"]},
    "base has a NUL": {"base_model_name_or_path": "a\0b"},
    "init by code": {"init_lora_weights": "os.system"},
    "corda": {"corda_config": {"cache_file": "/etc/passwd"}, "init_lora_weights": "corda"},
    "eva": {"eva_config": {"rho": 1}, "init_lora_weights": "eva"},
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "weft_canary"},
    "runtime": {"runtime_config": {"x": 1}},
    "unknown type": {"peft_type": "weft_canary.Evil"},
    "type is a list": {"peft_type": ["LORA"]},
}


def _adapter(changes: Mapping[str, Any]) -> Callable[[Place], list[Any]]:
    def build(place: Place) -> list[Any]:
        folder = _with_code(place.adapter())
        (folder / "weft.json").unlink()
        edit(folder / "adapter_config.json", changes)
        return ask(folder)

    return build


def _pickle(kind: str) -> bytes:
    if kind == "plain":
        return pickle.dumps({"weight": Evil()})
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Evil(), protocol=2))
            archive.writestr("archive/version", "3\n")
        return buffer.getvalue()
    if kind == "bomb":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
            archive.writestr("archive/data/0", bytes(300_000_000))
        return buffer.getvalue()
    if kind == "npy":
        head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
        return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + pickle.dumps([Evil()])
    # A storage of 2**40 numbers, and nothing in it.
    return b"\x80\x02" + b"(" * 100_000 + b"]." if kind == "deep" else b"\x80\x02]q\x00(" + b"h\x00" * 100_000 + b"e."


def _pickles() -> Iterator[Case]:
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "model.pth", "consolidated.00.pth"):

        def base(place: Place, name: str = name) -> list[Any]:
            folder = place.model()
            (folder / "model.safetensors").unlink()
            (folder / name).write_bytes(_pickle("zip"))
            return ask(folder)

        yield Case("pickles", f"a model in {name}", base)
    for name in ("adapter_model.bin", "pytorch_adapter.bin"):

        def adapter(place: Place, name: str = name) -> list[Any]:
            folder = place.adapter()
            (folder / "adapter_model.safetensors").unlink()
            (folder / name).write_bytes(_pickle("zip"))
            return ask(folder)

        yield Case("pickles", f"an adapter in {name}", adapter)
    for kind in ("plain", "zip", "bomb", "deep", "memo", "npy"):

        def converted(place: Place, kind: str = kind) -> list[Any]:
            folder = place.model()
            (folder / "model.safetensors").unlink()
            (folder / "pytorch_model.bin").write_bytes(_pickle(kind))
            return ["convert", folder, "new"]

        yield Case("pickles", f"{kind}, converted", converted)

    def index(place: Place) -> list[Any]:
        folder = place.model()
        (folder / "model.safetensors").unlink()
        names = {"weight_map": {"a": "../../../../etc/passwd"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(names))
        return ["convert", folder, "new"]

    yield Case("pickles", "an index that leads out, converted", index)


YAML = {
    "python/object": "model: !!python/object/apply:os.system ['touch weft_canary.sh']\n",
    "python/name": "model: !!python/name:os.system\n",
    "python/module": "model: !!python/module:weft_canary\n",
    "python/object/new": "model: !!python/object/new:subprocess.Popen [[touch, weft_canary.sh]]\n",
    "own tag": "model: !include /etc/passwd\n",
    "template elsewhere": "model: tiny-llama\ndata: {data}\nmethod: lora\nchat_template: /etc/passwd.jinja\n",
    "base elsewhere": "model: /etc\ndata: {data}\nmethod: lora\n",
    "data is a device": "model: tiny-llama\ndata: /dev/zero\nmethod: lora\n",
    "trust": "model: tiny-llama\ndata: {data}\nmethod: lora\ntrust_remote_code: true\n",
}


def _yaml() -> Iterator[Case]:
    for name, text in YAML.items():

        def build(place: Place, text: str = text) -> list[Any]:
            path = place.folder / "run.yaml"
            path.write_text(text.replace("{data}", str(place.good.data)))
            return ["train", path]

        yield Case("code in YAML", name, build)


CASES: list[Case] = [
    *_json_cases(),
    Case("code in generation_config.json", "custom_generate", _generation),
    Case("code in adapter_config.json", "a model with an adapter in it", _both),
    *(Case("code in adapter_config.json", name, _adapter(changes)) for name, changes in ADAPTERS.items()),
    *_pickles(),
    *_yaml(),
]
