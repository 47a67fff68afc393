"""Configurations with sizes that no model has, and patterns that would be tried for ever."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tests.hostile.kit import Case, Place, ask, edit, train

HUGE = 10**12
CONFIGS: dict[str, Mapping[str, Any]] = {
    **{f"{key} = 10**12": {key: HUGE} for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "num_labels")},
    **{f"{key} = -1": {key: -1} for key in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")},
    **{f"{key} = 0": {key: 0} for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    **{f"{key} = '64'": {key: "64"} for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
    **{f"{key} = 1.5": {key: 1.5} for key in ("hidden_size", "num_hidden_layers")},
    **{f"{key} = true": {key: True} for key in ("hidden_size", "num_hidden_layers")},
    "hidden_size = []": {"hidden_size": []},
    "vocab_size = 10**7": {"vocab_size": 10**7},
    "num_hidden_layers = 4000": {"num_hidden_layers": 4000},
    "intermediate_size = 4000000": {"intermediate_size": 4_000_000},
    "hidden_act unknown": {"hidden_act": "os.system"},
    "rope_parameters is a list": {"rope_parameters": []},
    "rope_type unknown": {"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}},
    "layer_types of 10**6": {"layer_types": ["full_attention"] * 1_000_000},
    "eps is NaN": {"rms_norm_eps": float("nan")},
    "model_type is a list": {"model_type": ["llama"]},
    "model_type is a path": {"model_type": "../../etc"},
    "model_type is empty": {"model_type": ""},
    "gpt_neo, squares": {"model_type": "gpt_neo", "max_position_embeddings": 10**6, "num_layers": 4,
                         "attention_types": [[["global"], 4]]},
    "mixtral, experts": {"model_type": "mixtral", "num_local_experts": 16_000},
}  # fmt: skip

# Nested repeats: each takes a time that doubles with every character.
PATTERNS = [
    "([a-z.]+)+#",
    "(.*)*#",
    "([a-z_.0-9]+)+[A-Z]",
    "(.|.)*[A-Z]",
    "(\\w+\\.?)+#",
    "((m|mo|model|\\.|[a-z_0-9])*)*[A-Z]",
]
TEXTS = "a" * 40 + "!" + " a" * 50


def _patterns() -> Iterator[Case]:
    for pattern in PATTERNS:

        def targets(place: Place, pattern: str = pattern) -> list[Any]:
            return train("tiny-llama", place.good.data, f"target_modules={json.dumps(pattern)}")

        yield Case("patterns", f"target_modules {pattern}", targets)

        def file(place: Place, pattern: str = pattern) -> list[Any]:
            path = place.folder / "run.yaml"
            layers = {"layers_pattern": pattern, "layers_to_transform": [0]}
            settings = {"model": "tiny-llama", "data": str(place.good.data), "method": "lora"}
            path.write_text(json.dumps({**settings, **layers}))
            return ["train", path]

        yield Case("patterns", f"layers_pattern {pattern}", file)

        def ranks(place: Place, pattern: str = pattern) -> list[Any]:
            folder = place.adapter()
            (folder / "weft.json").unlink()
            edit(folder / "adapter_config.json", {"rank_pattern": {f".*{pattern}": 4}})
            return ask(folder)

        # One that is answered in time, with no, is no fault.
        yield Case("patterns", f"rank_pattern {pattern}", ranks, codes=(0, 2))

        def tokenizer(place: Place, pattern: str = pattern) -> list[Any]:
            folder = place.model()
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            edit(folder / "tokenizer.json", {"pre_tokenizer": split})
            return [*ask(folder)[:-4], "--prompt", TEXTS, "--max-new-tokens", "1"]

        yield Case("patterns", f"tokenizer.json's pre-tokenizer {pattern}", tokenizer)

        def normalizer(place: Place, pattern: str = pattern) -> list[Any]:
            folder = place.model()
            edit(folder / "tokenizer.json", {"normalizer": {
                "type": "Sequence", "normalizers": [
                    {"type": "Replace", "pattern": {"Regex": pattern}, "content": "b" * 1000}]}})  # fmt: skip
            return [*ask(folder)[:-4], "--prompt", TEXTS, "--max-new-tokens", "1"]

        yield Case("patterns", f"tokenizer.json's normalizer {pattern}", normalizer)


def _sizes() -> Iterator[Case]:
    for name, changes in CONFIGS.items():

        def build(place: Place, changes: Mapping[str, Any] = changes) -> list[Any]:
            folder = place.model()
            edit(folder / "config.json", changes)
            return ask(folder)

        yield Case("absurd sizes", name, build)

        def meta(place: Place, changes: Mapping[str, Any] = changes) -> list[Any]:
            folder = place.model()
            edit(folder / "config.json", changes)
            return train(folder, place.good.data)

        yield Case("absurd sizes, trained on", name, meta)
    for name, changes in {
        "r = 10**9": {"r": 10**9}, "r of a pattern = 10**9": {"rank_pattern": {"q_proj": 10**9}},
    }.items():  # fmt: skip

        def adapter(place: Place, changes: Mapping[str, Any] = changes) -> list[Any]:
            folder = place.adapter()
            (folder / "weft.json").unlink()
            edit(folder / "adapter_config.json", changes)
            return ask(folder)

        yield Case("absurd sizes", f"an adapter's {name}", adapter)

    def vocabulary(place: Place) -> list[Any]:
        folder = place.model()
        values = json.loads((folder / "tokenizer.json").read_text())
        values["added_tokens"].append({**values["added_tokens"][0], "id": 10**9, "content": "<far>"})
        (folder / "tokenizer.json").write_text(json.dumps(values))
        return [*ask(folder)[:-4], "--prompt", "<far>", "--max-new-tokens", "1"]

    yield Case("absurd sizes", "a token's number", vocabulary)


CASES: list[Case] = [*_sizes(), *_patterns()]
