"""Rows of tokens beside other methods: what the user names stays, what several methods do at a table adds up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import kit
from transformers import T5Config, T5ForConditionalGeneration

from weft.api import Adapters
from weft.combine.rules import Combination, Source, combine
from weft.core.stream import Part
from weft.errors import UserError
from weft.methods import METHODS
from weft.methods.combined import CombinedConfig
from weft.methods.trainable_tokens import with_token_rows
from weft.models import describe

NEW = [40, 41]


@pytest.mark.parametrize(
    ("given", "tied", "wanted"),
    [
        (None, True, {"model.embed_tokens": NEW}),
        (None, False, {"model.embed_tokens": NEW, "lm_head": NEW}),
        ([5, 40], True, {"model.embed_tokens": [5, 40, 41]}),
        ([5], False, {"model.embed_tokens": [5, *NEW], "lm_head": NEW}),
        ({"lm_head": [7]}, False, {"model.embed_tokens": NEW, "lm_head": [7, *NEW]}),
        ({"lm_head": [7]}, True, {"model.embed_tokens": [7, *NEW]}),
    ],
)
def test_what_the_user_names_is_trained_too(given: Any, tied: bool, wanted: dict[str, list[int]]) -> None:
    model = kit.make_model("llama", tie_word_embeddings=tied)
    for method in ("lora", "adalora"):
        config: Any = with_token_rows(METHODS[method](trainable_token_indices=given), NEW, model)
        assert config.trainable_token_indices == wanted


def test_the_part_that_asks_for_tokens_gets_them() -> None:
    model = kit.make_model("llama")
    lora, tokens = METHODS["lora"](), METHODS["trainable_tokens"]()
    for parts in ((lora, tokens), (tokens, lora)):
        found: Any = with_token_rows(CombinedConfig(parts=parts), NEW, model)
        of_tokens = [part for part in found.parts if part.method == "trainable_tokens"]
        assert [part.token_indices for part in of_tokens] == [NEW]
    full = CombinedConfig(parts=(METHODS["full"](), lora))
    assert with_token_rows(full, NEW, model) is full


@pytest.mark.parametrize("table", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("first", [True, False])
def test_with_a_change_of_the_whole_table(table: str, first: bool) -> None:
    """The table's change comes to the own rows, here and merged; a tied head answers by the same numbers."""
    names = {"embed_tokens": "train_embeddings", "lm_head": "train_head"}
    model = kit.make_model("llama", tie_word_embeddings=True)
    rows = METHODS["trainable_tokens"](token_indices=NEW)
    freeze = METHODS["freeze"](**{names[table]: True})
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", CombinedConfig(parts=(rows, freeze) if first else (freeze, rows)))
    kit.randomize(adapter)
    texts = [[3, 40, 7], [41, 5, 40, 9]]
    hidden = kit.hidden_of(adapters, [Part("it", texts)])
    logits = [adapters.logits(h, [("it", len(h))]) for h in hidden]
    merged = adapters.merge("it").tensors
    adapters.close()
    again = kit.make_model("llama", tie_word_embeddings=True)
    again.load_state_dict(merged)
    for ids, wanted in zip(texts, logits, strict=True):
        found = again(input_ids=torch.tensor([ids])).logits[0]
        kit.measured("rows and a change, merged", float((found - wanted).abs().max()), 1e-5)


def test_lora_with_rows_is_combined() -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    config = METHODS["lora"](r=2, trainable_token_indices=NEW)
    made = [kit.randomize(adapters.add(name, config, seed=i), i) for i, name in enumerate("ab")]
    sources = [Source(one.name, config, one.tensors()) for one in made]
    for kind in ("cat", "svd"):
        _, tensors = combine(sources, Combination((0.25, 0.75), kind))
        key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        wanted = 0.25 * made[0].tensors()[key] + 0.75 * made[1].tensors()[key]
        assert torch.allclose(tensors[key], wanted)
    with pytest.raises(UserError, match="must sum to 1"):
        combine(sources, Combination((1.0, 1.0), "cat"))
    other = METHODS["lora"](r=2, trainable_token_indices=[5, 41])
    with pytest.raises(UserError, match="only rows of the same tokens"):
        combine([sources[0], Source("b", other, made[1].tensors())], Combination((0.5, 0.5), "cat"))


def test_an_encoder_decoder_has_them_at_the_shared_table() -> None:
    sizes: dict[str, int] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=97, decoder_start_token_id=0, **sizes)).eval()
    adapters = Adapters(model, describe(model))
    assert set(adapters.add("it", METHODS["trainable_tokens"](token_indices=NEW)).sites()) == {"shared", "lm_head"}
