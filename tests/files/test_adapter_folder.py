"""Folders of our own: two files that must agree, and tensors that must be those that were saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.files.tensors import digest
from weft.methods import METHODS
from weft.models import describe

LORA = "adapter_model.safetensors"


def opened(kind: str = "llama") -> Adapters:
    return Adapters(model := kit.make_model(kind), describe(model))


def saved(folder: Path, method: str = "lora", **settings: Any) -> Adapters:
    """An adapter's folder, and what it can be loaded on."""
    adapters = opened()
    kit.randomize(adapters.add("it", kit.method_config(method, **settings)))
    adapters.save("it", folder)
    return adapters


def edit(path: Path, **entries: Any) -> None:
    """Set keys of a JSON file; ... takes one out."""
    value = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not ...}))


@pytest.mark.parametrize("method", kit.ALL)
def test_the_sha256_of_every_tensor_is_beside_it(method: str, tmp_path: Path) -> None:
    adapters = saved(tmp_path, method)
    stated = json.loads((tmp_path / "weft.json").read_text())["sha256"]
    files = {path.name: read_tensors(path) for path in tmp_path.glob("*.safetensors")}
    assert {name: list(found) for name, found in stated.items()} == {name: sorted(t) for name, t in files.items()}
    for name, tensors in files.items():
        assert all(stated[name][key] == digest(tensor) for key, tensor in tensors.items())
    adapters.load("again", tmp_path)
    # Of an earlier version: nothing is stated, and it loads as before.
    edit(tmp_path / "weft.json", sha256=...)
    adapters.load("earlier", tmp_path)


def test_what_a_digest_tells_apart() -> None:
    one = torch.arange(6.0)
    same = [one.clone(), one.view(6), torch.stack([one, one], 1)[:, 0]]
    others = [one.view(2, 3), one.view(3, 2), one.half(), one.double(), one.to(torch.bfloat16), -one, one[:5],
              one.view(torch.int32), torch.tensor(0.0), torch.zeros(0), torch.zeros(0, 2)]  # fmt: skip
    assert {digest(tensor) for tensor in same} == {digest(one)}
    assert len({digest(tensor) for tensor in (one, *others)}) == 1 + len(others)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix_tuning", "vera"])
def test_a_flipped_bit_is_named(method: str, tmp_path: Path) -> None:
    """Any bit of any tensor: the file is as well formed as before."""
    adapters = saved(tmp_path, method)
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    layout = json.loads(good[8:header])
    for key, entry in list(layout.items())[:4]:
        if key == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        for place, bit in ((begin, 1), ((begin + end) // 2, 4), (end - 1, 128)):
            bad = bytearray(good)
            bad[header + place] ^= bit
            path.write_bytes(bad)
            with pytest.raises(UserError, match=f"SHA-256.*1 changed .*'{key}'"):
                adapters.load("again", tmp_path)
    assert adapters.names == ["it"]
    path.write_bytes(good)
    adapters.load("again", tmp_path)


def test_tensors_that_are_missing_or_new_are_named(tmp_path: Path) -> None:
    adapters = saved(tmp_path)
    tensors = load_file(tmp_path / LORA)
    first, second = sorted(tensors)[:2]
    save_file({key: t for key, t in tensors.items() if key != first}, tmp_path / LORA)
    with pytest.raises(UserError, match=f"1 missing .*'{first}'"):
        adapters.load("again", tmp_path)
    strange = {**tensors, "stranger": tensors[first].clone()}
    save_file(strange, tmp_path / LORA)
    with pytest.raises(UserError, match=r"1 not there before .*'stranger'"):
        adapters.load("again", tmp_path)
    save_file({**tensors, first: tensors[second], second: tensors[first]}, tmp_path / LORA)
    with pytest.raises(UserError, match="2 changed"):
        adapters.load("again", tmp_path)
    # Without what we know of it the file is one that peft could have written, and then its names decide.
    (tmp_path / "weft.json").unlink()
    save_file(strange, tmp_path / LORA)
    with pytest.raises(UserError, match=r"nothing here uses: 'stranger'"):
        adapters.load("again", tmp_path)
    save_file({key: t for key, t in tensors.items() if key != first}, tmp_path / LORA)
    with pytest.raises(UserError, match=f"no tensor '{first}'"):
        adapters.load("again", tmp_path)


def test_every_part_and_the_encoder_and_the_head_are_checked(tmp_path: Path) -> None:
    from weft.heads.classification import ClassificationTask
    from weft.methods.combined import CombinedConfig

    adapters = opened()
    parts = (kit.method_config("lora"), kit.method_config("prefix_tuning", prefix_projection=True))
    adapters.add("it", CombinedConfig(parts=parts), head=ClassificationTask(("a", "b")))
    adapters.save("it", tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 4
    for path in files:
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{path.name} does not hold the tensors"):
            adapters.load("again", tmp_path)
        path.write_bytes(good)
    adapters.load("again", tmp_path)


def with_values(tensor: Tensor, *values: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-len(values) :] = torch.tensor(values)
    return changed


SICK = {
    "NaN": (lambda t: with_values(t, float("nan")), r"holds 1 of \d+ numbers that are NaN or infinite.* \[3, 31\]"),
    "infinite": (lambda t: with_values(t, float("inf"), 0.0, -float("inf")), r"holds 2 of .* \[3, 29\]"),
    "integers": (lambda t: t.to(torch.int64), "is int64; an adapter's tensors are float32"),
    "bytes": (lambda t: t.to(torch.uint8), "is uint8"),
    "truths": (lambda t: t > 0, "is bool"),
    "eight bits": (lambda t: t.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
    "another shape": (lambda t: t[:, 1:].contiguous(), "has shape .* Was the adapter made for another base"),
    "transposed": (lambda t: t.t().contiguous(), r"has shape \(32, 4\); .* need \(4, 32\)\. It is transposed"),
    "nothing": (lambda t: t[:0], "has shape .*of no elements.*gathered"),
}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("what", SICK)
def test_sick_tensors_are_named(what: str, ours: bool, tmp_path: Path) -> None:
    """Also where nobody has stated a SHA-256, and where the SHA-256 is that of the sick one."""
    change, words = SICK[what]
    adapters = saved(tmp_path, r=4, target_modules=["q_proj"])
    tensors = load_file(tmp_path / LORA)
    key = min(key for key in tensors if "lora_A" in key)
    tensors[key] = change(tensors[key])
    save_file(tensors, tmp_path / LORA)
    if ours:
        edit(tmp_path / "weft.json", sha256={LORA: {k: digest(t) for k, t in tensors.items()}})
    else:
        (tmp_path / "weft.json").unlink()
    with pytest.raises(UserError, match=f"'{key}' {words}"):
        adapters.load("again", tmp_path)
    assert adapters.names == ["it"]


def test_missing_and_unexpected_tensors_are_named_together(tmp_path: Path) -> None:
    """Of a file that nobody has stated a SHA-256 for: one renamed, two lost."""
    adapters = saved(tmp_path, r=4, target_modules=["q_proj"])
    tensors = load_file(tmp_path / LORA)
    first, second, third, *_ = sorted(tensors)
    wrong = first.replace("lora_A", "lora_Z")
    tensors = {wrong if key == first else key: t for key, t in tensors.items() if key not in (second, third)}
    save_file(tensors, tmp_path / LORA)
    (tmp_path / "weft.json").unlink()
    with pytest.raises(UserError) as caught:
        adapters.load("again", tmp_path)
    message = str(caught.value)
    assert f"has no tensor '{first}', '{second}', '{third}'. Did you mean '{wrong}'?" in message
    assert f"And the adapter's file holds tensors that nothing here uses: '{wrong}'" in message
    assert adapters.names == ["it"]


@pytest.mark.parametrize("method", kit.ALL)
def test_what_is_not_finite_is_not_saved(method: str, tmp_path: Path) -> None:
    adapters = opened()
    adapter = adapters.add("it", kit.method_config(method))
    with torch.no_grad():
        for tensor in (*adapter.parameters(), *adapter.buffers()):
            if tensor.is_floating_point():
                tensor.view(-1)[-1:] = float("nan")
    with pytest.raises(UserError, match=r"adapter 'it' is not saved: tensor .* holds \d+ of \d+ numbers"):
        adapters.save("it", tmp_path / "it")
    assert not (tmp_path / "it").exists()


# Method, its settings, and what adapter_config.json is changed to: what is shown of it.
DISAGREE: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    ("lora", {"lora_alpha": 32}, {"lora_alpha": 16}, ["lora_alpha: 32.0 in weft.json, 16 in adapter_config.json"]),
    ("lora", {"lora_alpha": 32}, {"lora_alpha": ...}, ["lora_alpha: 32.0 in weft.json, not there, which is 8 in"]),
    ("lora", {}, {"use_rslora": True, "r": 8}, ["use_rslora: False in weft.json, True", "r: 4 in weft.json, 8"]),
    ("lora", {"use_rslora": True}, {"use_rslora": ...}, ["use_rslora: True in weft.json, not there, which is False"]),
    ("lora", {"alpha_pattern": {"q_proj": 3}}, {"alpha_pattern": {}}, ["alpha_pattern: {'q_proj': 3.0} in weft.json"]),
    ("lora", {}, {"bias": "all"}, ["bias: 'none' in weft.json, 'all'"]),
    ("lora", {}, {"modules_to_save": ["lm_head"]}, ["modules_to_save: [] in weft.json, ['lm_head']"]),
    ("lora", {"target_modules": ["q_proj"]}, {"target_modules": ["k_proj"]}, ["target_modules: ['q_proj'] in"]),
    ("lora", {"target_modules": ["q_proj", "k_proj"]}, {"target_modules": ["k_proj"]}, ["target_modules: ['q_proj', "]),
    ("lora", {"target_modules": r".*\.1\..*q_proj"}, {"target_modules": ["model.layers.0.self_attn.q_proj"]},
     ["target_modules: "]),
    ("lora", {"init_lora_weights": "pissa"}, {"r": 4, "lora_alpha": 16}, ["r: 8 in weft.json, 4", "lora_alpha: 32.0"]),
    ("lora", {}, {"peft_type": "IA3"}, ["peft_type: 'LORA' in weft.json, 'IA3'"]),
    ("adalora", {}, {"init_r": 9}, ["init_r: 4 in weft.json, 9"]),
    ("vera", {"r": 8}, {"d_initial": 0.2, "projection_prng_key": 1}, ["d_initial: 0.1 in", "prng_key: 0"]),
    ("ia3", {}, {"init_ia3_weights": False}, ["init_ia3_weights: True"]),
    ("ln_tuning", {"target_modules": ["norm"]}, {"target_modules": ["model.layers.0.input_layernorm"]}, ["target_mod"]),
    ("prompt_tuning", {}, {"num_virtual_tokens": 3}, ["num_virtual_tokens: 5 in weft.json, 3"]),
    ("prompt_tuning", {"virtual_position": "after"}, {"peft_type": "PROMPT_TUNING"}, ["'PROMPT_TUNING_AFTER' in weft"]),
    ("prefix_tuning", {}, {"num_virtual_tokens": ...}, ["num_virtual_tokens: 4 in weft.json, not there"]),
    ("p_tuning", {}, {"encoder_reparameterization_type": "LSTM"}, ["encoder_reparameterization_type: 'MLP'"]),
    ("hard_prompt", {}, {"num_virtual_tokens": 9}, ["num_virtual_tokens: 4 in weft.json, 9"]),
    ("bitfit", {}, {"add_missing": False}, ["add_missing: True in weft.json, False"]),
    ("freeze", {}, {"num_layers_trainable": 3}, ["num_layers_trainable: None in weft.json, 3"]),
]  # fmt: skip


@pytest.mark.parametrize(("method", "settings", "entries", "words"), DISAGREE)
def test_two_files_that_disagree(
    method: str, settings: dict[str, Any], entries: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    adapters = saved(tmp_path, method, **settings)
    adapters.load("before", tmp_path)
    edit(tmp_path / "adapter_config.json", **entries)
    with pytest.raises(UserError) as caught:
        adapters.load("again", tmp_path)
    text = str(caught.value)
    assert "weft.json and adapter_config.json disagree:" in text
    for part in words:
        assert part in text
    assert text.count("\n  ") == len(entries), "only what was changed is shown"


def test_a_bottleneck_adapters_files_disagree(tmp_path: Path) -> None:
    """AdapterHub keeps its settings one level deeper."""
    adapters = saved(tmp_path, "bottleneck")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())["config"]
    edit(path, config={**config, "reduction_factor": 8, "scaling": 2.0})
    with pytest.raises(UserError, match=r"reduction_factor: 4.0 in weft.json, 8 in adapter(.|\n)*scaling: 1.0 in weft"):
        adapters.load("again", tmp_path)


def test_weft_json_can_be_the_one_that_was_changed(tmp_path: Path) -> None:
    adapters = saved(tmp_path)
    config = json.loads((tmp_path / "weft.json").read_text())["config"]
    edit(tmp_path / "weft.json", config={**config, "lora_alpha": 99})
    with pytest.raises(UserError, match=r"lora_alpha: 99.0 in weft.json, 16.0 in adapter_config.json"):
        adapters.load("again", tmp_path)


def test_parts_disagree_too(tmp_path: Path) -> None:
    from weft.methods.combined import CombinedConfig

    adapters = opened()
    adapters.add("it", CombinedConfig(parts=(kit.method_config("lora"), kit.method_config("bitfit"))))
    adapters.save("it", tmp_path)
    edit(tmp_path / "1-lora" / "adapter_config.json", lora_alpha=3)
    with pytest.raises(UserError, match=r"1-lora.*disagree"):
        adapters.load("again", tmp_path)


# What peft itself may have changed when it saved over it, and other words for the same.
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("lora", {}, {"peft_version": "0.21.2", "lora_alpha": 16, "inference_mode": False, "exclude_modules": None}),
    ("lora", {}, {"target_modules": ["down_proj", "q_proj"], "alpha_pattern": None, "layers_pattern": []}),
    ("lora", {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["v_proj", "q_proj"]}),
    ("lora", {"target_modules": ["q_proj"]}, {"target_modules": [f"layers.{i}.self_attn.q_proj" for i in (0, 2)]}),
    ("lora", {"target_modules": ["self_attn.q_proj"]}, {"target_modules": ["q_proj"]}),
    ("lora", {"target_modules": ["q_proj"], "layers_to_transform": [1]},
     {"target_modules": ["model.layers.1.self_attn.q_proj"]}),
    ("lora", {"modules_to_save": ["lm_head", "norm"]}, {"modules_to_save": ["norm", "lm_head"]}),
    ("lora", {"init_lora_weights": "pissa"}, {"r": 8, "lora_alpha": 32}),
    ("adalora", {}, {"total_step": 1, "tinit": ...}),
    ("prompt_tuning", {}, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "settings", "entries"), SAME)
def test_two_files_that_say_the_same(
    method: str, settings: dict[str, Any], entries: dict[str, Any], tmp_path: Path
) -> None:
    adapters = saved(tmp_path, method, **settings)
    edit(tmp_path / "adapter_config.json", **entries)
    adapters.load("again", tmp_path)


def test_every_method_agrees_with_itself(tmp_path: Path) -> None:
    """On bases of all kinds, with a head of its own, and whatever the settings."""
    from weft.heads.classification import ClassificationTask

    many: list[tuple[str, dict[str, Any]]] = [(method, {}) for method in kit.ALL]
    many += [(method, kit.DROPOUT[method]) for method in kit.DROPOUT]
    many += [("ia3", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
             ("lora", {"use_rslora": True, "init_lora_weights": "pissa", "rank_pattern": {"c_fc": 2}}),
             ("vera", {"save_projection": False, "layers_to_transform": [0]})]  # fmt: skip
    for kind in ("llama", "gpt2", "bloom"):
        adapters = opened(kind)
        for index, (method, settings) in enumerate(many):
            if index >= len(kit.ALL) and kind != "gpt2":
                continue
            for labels in (None, ("a", "b")):
                if labels and "sequence_classification" not in METHODS[method].tasks:
                    continue
                task = ClassificationTask(labels) if labels else None
                adapters.add("it", kit.method_config(method, **settings), head=task)
                adapters.save("it", tmp_path / "it")
                adapters.load("again", tmp_path / "it")
                adapters.remove("it")
                adapters.remove("again")


@pytest.mark.parametrize("value", [[], 3, {LORA: 3}, {LORA: {"a": 1}}, {LORA: ["x"]}], ids=str)
def test_a_sha256_of_another_type(value: Any, tmp_path: Path) -> None:
    adapters = saved(tmp_path)
    edit(tmp_path / "weft.json", sha256=value)
    with pytest.raises(UserError, match=r"sha256 .*must be a JSON object"):
        adapters.load("again", tmp_path)
