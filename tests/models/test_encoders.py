"""Encoders in the stream: transformers' own logits, the padded batch and the stream agree for all methods."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import kit
from tests.kit import encoders as encoder_kit
from tests.kit.encoders import make_encoder, save_bert, their_logits, token_types
from torch import Tensor, nn

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.generation import Request, generate
from weft.heads.classification import ClassificationHead, ClassificationTask
from weft.layouts.padded_batch import Padded
from weft.models import describe, load_base
from weft.models.facts import ENCODERS
from weft.models.load import sketch_base
from weft.objectives.passes import answer_logits
from weft.training.same_run import base_fingerprint

TASK = ClassificationTask(("bad", "good"))
# Methods that no encoder can take, and what they say.
REFUSED = {"llama_pro": "normalises after the residual sum"}


def copy_head(head: nn.Module | None, model: nn.Module) -> None:
    """transformers' own head into an adapter's."""
    assert isinstance(head, ClassificationHead)
    theirs = model.state_dict()
    with torch.no_grad():
        for key, parameter in head.stored().items():
            parameter.copy_(theirs[key.removeprefix("base_model.model.")])


def classes(adapters: Adapters, parts: list[Part]) -> list[Tensor]:
    """Class logits of every sequence; all parts have an adapter."""
    stream = adapters.stream(parts)
    hidden = adapters.forward(stream)
    found, first = [], 0
    for part in parts:
        numbers = range(first, first + len(part.sequences))
        assert part.adapter is not None
        found += list(answer_logits(adapters, part.adapter, stream, hidden, numbers))
        first = numbers.stop
    return found


def test_the_table_is_the_kits() -> None:
    assert sorted(ENCODERS) == sorted(encoder_kit.KINDS)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", encoder_kit.KINDS)
def test_the_plain_model_is_what_transformers_computes(kind: str, padded: bool) -> None:
    model = make_encoder(kind)
    architecture = describe(model)
    texts = kit.texts(6, 1, 20, seed=1)
    types = token_types(kind, texts)
    with torch.no_grad():
        wanted = their_logits(model, texts, types)
        if types:
            assert kit.difference(wanted, their_logits(model, texts)) > 1e-3, "the types must matter"
    before = model.config._attn_implementation
    adapters = Adapters(model, architecture, padded=padded)
    adapter = adapters.add("it", kit.method_config("lora"), head=TASK)
    copy_head(adapter.head, model)
    with torch.no_grad():
        found = classes(adapters, [Part("it", texts, token_types=types)])
    adapters.close()
    assert model.config._attn_implementation == before
    kit.measured(f"{kind} padded={padded}: ours - transformers", kit.difference(wanted, found), 1e-5)
    assert len(architecture.attention_output) == len(architecture.mlp_output) == architecture.num_layers == 2
    assert architecture.max_length == (62 if "pad_token_id" in encoder_kit.SPECIAL.get(kind, {}) else 64)
    assert architecture.bidirectional
    assert architecture.head == ""
    assert not any("pooler" in path for path in (*architecture.linears, *architecture.activations))


@pytest.mark.parametrize("kind", encoder_kit.KINDS)
def test_all_methods_in_the_stream_padded_exact_and_one_by_one(kind: str) -> None:
    model = make_encoder(kind, torch.float64)
    names = _names(model, prefix=kind != "distilbert")  # whose attention takes none in padded batches
    parts = []
    for index, name in enumerate(names):
        texts = kit.texts(3, 2, 16, seed=index)
        parts.append(Part(name, texts, 7 + index, token_types=token_types(kind, texts)))
    alone = [
        [Part(p.adapter, [ids], p.seed, token_types=p.token_types[i : i + 1])]
        for p in parts
        for i, ids in enumerate(p.sequences)
    ]
    ways: list[tuple[list[list[Part]], dict[str, bool]]] = [
        ([parts], {}), ([parts], {"padded": True}), ([parts], {"exact": True}), ([parts], {"checkpointing": True}),
        (alone, {}),
    ]  # fmt: skip
    found = []
    for groups, options in ways:
        adapters = _opened(model, names, **options)
        logits = [x for group in groups for x in classes(adapters, group)]
        torch.autograd.backward([x.square().sum() for x in logits])
        gradients = {name: kit.gradients(adapters[name]) for name in names}
        assert all(gradients.values())
        assert all("head.weight" in of for of in gradients.values())
        if kind == "bert" and "full" in names:  # its pooler too, which sees one row per text
            pooler = adapters["full"].sites()["bert.pooler.dense"]
            assert isinstance(pooler, nn.Module)
            of_pooler = {id(p) for p in pooler.parameters()}
            found_in = [n for n, p in adapters["full"].named_parameters() if id(p) in of_pooler]
            assert found_in
            assert all(gradients["full"][n].abs().max() > 0 for n in found_in)
        found.append(([x.detach() for x in logits], gradients))
        adapters.close()
    for (logits, gradients), what in zip(found[1:], ("padded", "exact", "checkpointing", "one by one"), strict=True):
        kit.measured(f"{kind}: stream - {what}", kit.difference(found[0][0], logits), 1e-12)
        for name in names:
            assert gradients[name].keys() == found[0][1][name].keys()
            pairs = (gradients[name].values(), found[0][1][name].values())
            kit.measured(f"{kind}: stream - {what}, gradients of {name}", kit.difference(*pairs), 1e-11)


def _opened(model: nn.Module, names: list[str], **options: bool) -> Adapters:
    adapters = Adapters(model, describe(model), **options)
    for index, name in enumerate(names):
        kit.randomize(adapters.add(name, kit.method_config(name), seed=index, head=TASK), index)
    return adapters


def _names(model: nn.Module, *, prefix: bool) -> list[str]:
    """The methods for classification; with ``prefix`` False those that need no prefix."""
    fitting = [name for name in kit.ALL if "sequence_classification" in kit.METHODS[name].tasks]
    adapters = _opened(model, [name for name in fitting if name not in REFUSED])
    found = [name for name in adapters.names if prefix or not adapters[name].num_prefix_tokens]
    adapters.close()
    return found


@pytest.mark.parametrize("method", REFUSED)
def test_a_misfit_says_why(method: str) -> None:
    model = make_encoder("bert")
    adapters = Adapters(model, describe(model))
    with pytest.raises(UserError, match=REFUSED[method]):
        adapters.add("it", kit.method_config(method), head=TASK, blank=True)
    adapters.close()


def test_a_prefix_that_a_padded_batch_would_lose_is_refused() -> None:
    model = make_encoder("distilbert")
    adapters = Adapters(model, describe(model))
    adapters.add("it", kit.method_config("prefix_tuning", prefix_init="random"), head=TASK)
    adapters._layout = Padded(model, adapters.architecture, adapters.router, adapters._adapters, exact=False)
    with pytest.raises(UserError, match="takes no prefix in padded batches"):
        classes(adapters, [Part("it", kit.texts(2))])
    adapters.close()


def test_the_model_comes_back_whole() -> None:
    model = make_encoder("bert")
    kinds = [type(module) for module in model.modules()]
    before = kit.sha256(model.state_dict().values())
    attributes = [sorted(module.__dict__) for module in model.modules()]
    adapters = _opened(model, _names(model, prefix=True), exact=True)
    loss = torch.stack(classes(adapters, [Part(n, kit.texts(2)) for n in adapters.names])).square().sum()
    loss.backward()
    adapters.close()
    assert kit.sha256(model.state_dict().values()) == before
    assert [type(module) for module in model.modules()] == kinds
    assert [sorted(module.__dict__) for module in model.modules()] == attributes


def test_it_writes_no_text() -> None:
    model = make_encoder("bert")
    adapters = _opened(model, ["lora"])
    for name in (None, "lora"):
        with pytest.raises(UserError, match="bert model is an encoder: it writes no text"):
            generate(adapters, [Request([3, 4], name)], stop_ids=())
    adapters.close()


def test_segments_that_the_model_does_not_know_are_refused() -> None:
    model = make_encoder("roberta")
    adapters = _opened(model, ["lora"])
    with pytest.raises(UserError, match="2 segments apart, the model 1"):
        adapters.stream([Part("lora", [[3, 4]], token_types=[[0, 1]])])
    adapters.close()


def test_a_bert_that_decodes_is_refused() -> None:
    from transformers import AutoModelForCausalLM

    config = make_encoder("bert").config
    config.is_decoder = True
    with pytest.raises(UserError, match="is_decoder"):
        describe(AutoModelForCausalLM.from_config(config))


def test_loading_gives_the_body_under_the_paths_of_its_classifier(tmp_path: Path) -> None:
    """Whatever head the folder came with, or none: the same base, the same paths as PEFT's files."""
    folders = [save_bert(tmp_path / "bare"), tmp_path / "classifier"]
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(folders[0], num_labels=5).save_pretrained(folders[1])
    base = load_base(str(folders[0]))
    base.tokenizer.save_pretrained(folders[1])
    bases = [base, load_base(str(folders[0])), load_base(str(folders[1]))]
    assert all(b.architecture.blocks[0] == "bert.encoder.layer.0" for b in bases)
    assert bases[0].architecture.pooler == "bert.pooler"
    prints = [{**base_fingerprint(b), "model": ""} for b in bases]
    assert prints[0] == prints[1] == prints[2]
    assert set(bases[0].model.state_dict()) == set(sketch_base(str(folders[0])).model.state_dict())
    assert not any("classifier" in key for key in bases[2].model.state_dict())


def test_a_bert_without_its_pooler_is_refused(tmp_path: Path) -> None:
    """Made up anew at every load, it would mean something else to every adapter."""
    from transformers import AutoModelForMaskedLM

    save_bert(tmp_path)
    AutoModelForMaskedLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks 2 of its tensors: bert\.pooler"):
        load_base(str(tmp_path))


def test_an_encoder_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    from transformers import DebertaV2Config

    DebertaV2Config(num_hidden_layers=1, hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path)
    for load in (sketch_base, load_base):
        with pytest.raises(UserError, match=r"deberta-v2, .* none of the encoders that Weft knows: bert"):
            load(str(tmp_path))
