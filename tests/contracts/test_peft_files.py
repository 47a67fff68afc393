"""Files of peft as others hand them on: keys that are missing, endings without a dot, tables of a resized base, and
names with what torch.compile, FSDP, DDP or a multimodal wrapper put between."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from tests import kit
from tests.contracts.test_peft import TARGETS, edit, fresh_peft, peft_config, peft_logits
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.methods import METHODS
from weft.models import describe

LIMIT = 1e-5
WEIGHTS = "adapter_model.safetensors"
# Read from the tensors, whatever the file says.
FROM_TENSORS = {"target_modules", "feedforward_modules"}
KEYS = {
    "LORA": ["base_model.model.q.lora_A.weight"],
    "ADALORA": ["base_model.model.q.lora_A"],
    "IA3": ["base_model.model.q.ia3_l"],
    "VERA": ["base_model.model.q.vera_lambda_b"],
    "LN_TUNING": ["base_model.model.q.ln_tuning_layers.weight"],
}
THEIRS = {
    method: cls for method, cls in METHODS.items() if cls.peft_type in PEFT_TYPE_TO_CONFIG_MAPPING
    if method not in ("hard_prompt", "p_tuning_v2")  # their files are read as prompt_tuning, as prefix_tuning
}  # fmt: skip


def peft_default(field: Any) -> Any:
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return getattr(value, "value", value)


@pytest.mark.parametrize("method", sorted(THEIRS))
def test_a_missing_key_is_pefts_default(method: str) -> None:
    """All fields that we share; where peft has None for what must be a number, the key must be there."""
    ours = THEIRS[method]
    fields = {f.name: peft_default(f) for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[ours.peft_type])}
    shared = fields.keys() & ours.model_fields.keys() - FROM_TENSORS
    assert shared or method == "ln_tuning"
    needed = {"num_virtual_tokens": 4} if "num_virtual_tokens" in shared else {}
    read = ours.from_peft(dict(needed), KEYS.get(ours.peft_type, ["prompt_embeddings"]))
    assert {key: getattr(read, key) for key in shared} == {**{key: fields[key] for key in shared}, **needed}
    for key in needed:
        assert fields[key] is None
        with pytest.raises(UserError, match=f"'{key}' is not there"):
            ours.from_peft({}, ["prompt_embeddings"])
    # A configuration that a person writes has our own.
    own = ours()
    assert {key for key in shared if getattr(own, key) != fields[key]} == set(ours.peft_defaults)


def test_every_method_that_peft_has_is_compared() -> None:
    named = {"lora", "adalora", "ia3", "ln_tuning", "vera", "prompt_tuning", "p_tuning", "prefix_tuning"}
    assert set(THEIRS) == named | {"trainable_tokens"}


def our_logits(adapters: Adapters, name: str, texts: list[list[int]]) -> list[Tensor]:
    """The output layer's own changes too."""
    return [adapters.logits(h, [(name, len(h))]) for h in kit.hidden_of(adapters, [Part(name, texts)])]


def load(folder: Path, kind: str = "llama", **more: Any) -> tuple[Adapters, Any]:
    adapters = Adapters(model := kit.make_model(kind, **more), describe(model))
    return adapters, adapters.load("it", folder)


def without(folder: Path, *keys: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))


def test_a_file_without_alpha_computes_what_peft_computes(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS["llama"])
    theirs = fresh_peft("llama", config)
    theirs.save_pretrained(tmp_path)
    without(tmp_path, "lora_alpha", "bias", "use_rslora", "lora_dropout", "alpha_pattern")
    again = peft.PeftModel.from_pretrained(kit.make_model("llama"), tmp_path).eval()
    adapters, adapter = load(tmp_path)
    assert adapter.config.lora_alpha == 8
    texts = kit.texts(3)
    wanted = peft_logits(again, texts, padded=False)
    kit.measured("no lora_alpha, ours - peft", kit.difference(our_logits(adapters, "it", texts), wanted), LIMIT)


@pytest.mark.parametrize("names", [["norm"], ["proj"], ["lm_head", "layernorm"]], ids=str)
def test_endings_without_a_dot(names: list[str], tmp_path: Path) -> None:
    """``norm`` is every ``input_layernorm`` too, in peft's files and in ours."""
    targets = ["q_proj"] if names != ["proj"] else ["lm_head"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, modules_to_save=names)
    theirs = fresh_peft("llama", config)
    theirs.save_pretrained(tmp_path / "theirs")
    adapters, adapter = load(tmp_path / "theirs")
    texts = kit.texts(3)
    ours = our_logits(adapters, "it", texts)
    wanted = peft_logits(theirs, texts, padded=False)
    kit.measured(f"modules_to_save {names}, ours - peft", kit.difference(ours, wanted), LIMIT)
    assert len(adapter.own_paths) == {"norm": 7, "proj": 21, "lm_head": 7}[names[0]]

    settings = {"r": 4, "target_modules": targets, "modules_to_save": names}
    kit.randomize(adapters.add("own", kit.METHODS["lora"](**settings)))
    adapters.save("own", tmp_path / "ours")
    adapters.load("again", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(kit.make_model("llama"), tmp_path / "ours").eval()
    wanted = peft_logits(back, texts, padded=False)
    kit.measured(f"{names}: peft - ours", kit.difference(our_logits(adapters, "own", texts), wanted), LIMIT)


def resized(rows: int, **config: Any) -> Any:
    """A peft model whose base has got another number of tokens."""
    model = kit.make_model("llama")
    model.resize_token_embeddings(rows, mean_resizing=False)
    given = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **config}
    return peft.get_peft_model(model, peft.LoraConfig(**given)).eval()


@pytest.mark.parametrize("rows", [kit.VOCABULARY - 9, kit.VOCABULARY + 9])
def test_tables_of_a_resized_vocabulary_are_refused_in_these_words(rows: int, tmp_path: Path) -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    for index, config in enumerate(({}, {"modules_to_save": ["embed_tokens", "lm_head"]})):
        folder = tmp_path / str(index)
        resized(rows, **config).save_pretrained(folder, save_embedding_layers=True)
        with pytest.raises(
            UserError, match=rf"embed_tokens\.weight.*\({rows}, 32\).*\(97, 32\).* vocabulary was resized"
        ):
            adapters.load("it", folder)
    # On the base that was resized in the same way it is the base's own table.
    theirs = resized(rows)
    kit.randomize(theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_B)
    theirs.save_pretrained(tmp_path / "2", save_embedding_layers=True)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(theirs.get_input_embeddings().weight)
    model.get_output_embeddings().weight.data.copy_(theirs.get_output_embeddings().weight)
    adapters.close()
    adapters = Adapters(model, describe(model))
    adapters.load("it", tmp_path / "2")
    texts = kit.texts(2)
    assert kit.difference(our_logits(adapters, "it", texts), peft_logits(theirs, texts, padded=False)) <= LIMIT


@pytest.mark.parametrize("method", ["lora", "ia3", "ln_tuning", "prompt_tuning"])
def test_tables_of_the_base_in_the_file(method: str, tmp_path: Path) -> None:
    """With ``save_embedding_layers`` peft writes them beside any method; loading there puts them into the base."""
    theirs = fresh_peft("llama", peft_config("llama", method))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / WEIGHTS)
    (key,) = [key for key in tensors if key.endswith("embed_tokens.weight")]
    adapters, _ = load(tmp_path)
    texts = kit.texts(2)
    ours, wanted = our_logits(adapters, "it", texts), peft_logits(theirs, texts, padded=False)
    kit.measured(f"{method} and the base's tables, ours - peft", kit.difference(ours, wanted), LIMIT)
    tensors[key][3, 5] += 0.5
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=rf"{re.escape(key)}.* is not the base's.*save_embedding_layers"):
        adapters.load("again", tmp_path)


def test_tables_that_cannot_be_compared(tmp_path: Path) -> None:
    """``weft combine`` has no weights of the base."""
    from weft.files import adapter_folder as files

    fresh_peft("llama", peft_config("llama", "lora")).save_pretrained(tmp_path, save_embedding_layers=True)
    config, tensors, _ = files.read(tmp_path)
    model = kit.make_model("llama")
    files.assemble("it", config, tensors, model, describe(model))
    with pytest.raises(UserError, match="cannot be compared"):
        files.assemble("it", config, tensors, model.to("meta"), describe(model))


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


def named(key: str, adapter: str = "default") -> str:
    """As in a state dict: the adapter's name behind each part of it."""
    parts = r"lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l|vera_lambda_[bd]"
    key = re.sub(rf"\.({parts}|ln_tuning_layers)(?=\.|$)", rf".\1.{adapter}", key)
    key = re.sub(r"(lora_magnitude_vector\.\w+)$", r"\1.weight", key)
    key = re.sub(r"\.(norm|lm_head|mlp)\.(?=.*weight$)(?!.*lora)", rf".\1.modules_to_save.{adapter}.", key)
    return key.replace("prompt_embeddings", f"prompt_encoder.{adapter}.embedding.weight")


FSDP = "_fsdp_wrapped_module"
VARIANTS: dict[str, Callable[[str], str]] = {
    "default": named,
    "another name": lambda key: named(key, "my_adapter"),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda key: f"_orig_mod.{key}",
    "compiled blocks": lambda key: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", key),
    "FSDP": lambda key: f"{FSDP}." + re.sub(r"layers\.(\d+)\.", rf"layers.\1.{FSDP}.", key),
    "FSDP and checkpointing": lambda key: re.sub(
        r"layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module.", key
    ),
    "DDP": lambda key: f"module.{key}",
    "DDP twice, inside": lambda key: f"module.module.{key}".replace("base_model.model.", "base_model.model.module."),
    "all of it": lambda key: f"module._orig_mod._fsdp_wrapped_module.{named(key)}",
    "multimodal": lambda key: key.replace("base_model.model.", "base_model.model.language_model."),
    "multimodal, newer": lambda key: key.replace("base_model.model.model.", "base_model.model.model.language_model."),
    "text model": lambda key: key.replace("base_model.model.model.", "base_model.model.model.text_model."),
}
FILES: dict[str, dict[str, Any]] = {
    "lora": {"cls": peft.LoraConfig, "r": 3, "target_modules": ["q_proj", "down_proj"],
             "modules_to_save": ["lm_head", "model.norm"], "rank_pattern": {"q_proj": 2},
             "alpha_pattern": {"q_proj": 3}},
    "dora": {"cls": peft.LoraConfig, "r": 3, "target_modules": ["q_proj", "down_proj"], "use_dora": True,
             "modules_to_save": ["1.mlp"]},
    "embeddings": {"cls": peft.LoraConfig, "r": 3, "target_modules": ["embed_tokens", "q_proj"]},
    "ia3": {"cls": peft.IA3Config},
    "ln_tuning": {"cls": peft.LNTuningConfig, "target_modules": ["norm", "input_layernorm"]},
    "vera": {"cls": peft.VeraConfig, "r": 4, "target_modules": ["q_proj"]},
    "prompt_tuning": {"cls": peft.PromptTuningConfig, "num_virtual_tokens": 3},
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "variant"),
    [("lora", v) for v in VARIANTS] + kit.in_turn([f for f in FILES if f != "lora"], VARIANTS, take=4),
)
def test_names_as_others_write_them(file: str, variant: str, tmp_path: Path) -> None:
    given = dict(FILES[file])
    theirs = fresh_peft("llama", given.pop("cls")(task_type="CAUSAL_LM", **given))
    theirs.save_pretrained(tmp_path)
    before = set(load_file(tmp_path / WEIGHTS))
    if file == "dora" and variant in ("default", "another name", "all of it"):
        given["modules_to_save"] = None  # ``named`` knows whole modules only
    renamed(tmp_path, VARIANTS[variant])
    after = set(load_file(tmp_path / WEIGHTS))
    assert len(after) == len(before)
    adapters, _ = load(tmp_path)
    texts = kit.texts(3)
    ours, wanted = our_logits(adapters, "it", texts), peft_logits(theirs, texts, padded=False)
    kit.measured(f"{file} {variant}, ours - peft", kit.difference(ours, wanted), LIMIT)


def lora_file(folder: Path, **more: Any) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], **more)
    fresh_peft("llama", config).save_pretrained(folder)


def test_names_that_are_refused(tmp_path: Path) -> None:
    def refuse(words: str, change: Callable[[str], str], **more: Any) -> None:
        lora_file(tmp_path, **more)
        renamed(tmp_path, change)
        adapters = Adapters(model := kit.make_model("llama"), describe(model))
        with pytest.raises(UserError, match=words):
            adapters.load("it", tmp_path)
        assert adapters.names == []

    multimodal = VARIANTS["multimodal, newer"]
    tower = "base_model.model.language_model.encoder.layers.0.q_proj.lora_A.weight"
    refuse("holds a language model as 'language_model.'.*nor 'encoder.layers.0.q_proj'",
           lambda key: tower if re.search(r"layers\.0.*lora_A", key) else multimodal(key))  # fmt: skip
    refuse("several adapters: default.*other", lambda key: named(key, "other" if "layers.1" in key else "default"))
    refuse(r"pattern 'layers.*' may be meant .*language_model", multimodal, alpha_pattern={r"layers\.0.*": 3})
    refuse(r"vision_tower", lambda key: key.replace("model.layers.0", "vision_tower.layers.0"))
    refuse("no tensor|no linear module", lambda key: key.replace("base_model.model.", "engine."))


def test_two_names_that_become_one(tmp_path: Path) -> None:
    lora_file(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    first = min(tensors)
    save_file({**tensors, named(first): tensors[first] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=rf"'{re.escape(first)}'.*have one name"):
        load(tmp_path)


def test_a_base_that_is_called_so_keeps_its_names(tmp_path: Path) -> None:
    """``language_model.`` stays where the base's own modules are there, and the wrapper's name goes everywhere else."""
    from weft.files.tensor_names import normalised

    key = "base_model.model.model.language_model.layers.0.q_proj.lora_A.weight"
    one = {key: torch.zeros(1)}
    assert list(normalised(one, {}, {"model.language_model.layers.0.q_proj"})) == [key]
    assert list(normalised(one, {}, {"model.layers.0.q_proj"})) == [key.replace("language_model.", "")]
    assert list(normalised(one, {})) == [key], "with no base to look at, nothing is guessed"


def test_what_peft_has_no_default_for(tmp_path: Path) -> None:
    fresh_peft("llama", peft_config("llama", "prompt_tuning")).save_pretrained(tmp_path)
    without(tmp_path, "num_virtual_tokens")
    with pytest.raises(UserError, match="'num_virtual_tokens' is not there"):
        load(tmp_path)
    edit(tmp_path, num_virtual_tokens=5)
    load(tmp_path)
