"""Classification jobs: heads exchanged with peft, jobs of both tasks in one pass, whole runs on both kinds of base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.contracts import kit
from tests.models import encoder_kit
from tests.models.encoder_kit import make_encoder, their_logits
from torch import nn
from transformers import AutoModelForSequenceClassification

from weft.core.adapters import Adapters
from weft.core.files import read_tensors
from weft.core.heads import ClassificationTask
from weft.core.stream import Part
from weft.methods import METHODS
from weft.models import describe
from weft.train.step import class_logits

LIMIT = 1e-5
TASK = ClassificationTask(("bad", "fair", "good"))
DECODERS = ("llama", "gpt2", "bloom")
# What peft can do for classification too.
SHARED = [name for name in ("lora", "ia3", "prompt_tuning", "prefix_tuning", "p_tuning_v2") if name in METHODS]


def base_and_classifier(kind: str) -> tuple[nn.Module, Any]:
    """Our base, and transformers' classifier of three classes on the same body."""
    if kind not in DECODERS:
        return make_encoder(kind, num_labels=3), make_encoder(kind, num_labels=3)
    model = kit.make_model(kind)
    config = kit.model_config(kind)
    config.num_labels = 3
    theirs = AutoModelForSequenceClassification.from_config(config)
    rest = theirs.load_state_dict(model.state_dict(), strict=False)
    assert rest.missing_keys == ["score.weight"]
    return model, theirs.eval()


def our_logits(adapters: Adapters, name: str, texts: list[list[int]], types: list[list[int]] | None = None) -> Any:
    with torch.no_grad():
        stream = adapters.stream([Part(name, texts, token_types=types or ())])
        return list(class_logits(adapters, adapters.forward(stream), stream, name, range(len(texts))))


def peft_config(kind: str, method: str) -> peft.PeftConfig:
    if method == "lora":
        targets = {"gpt2": ["c_attn"], "bloom": ["query_key_value"], "llama": ["q_proj", "down_proj"],
                   "distilbert": ["q_lin", "lin2"]}.get(kind, ["query", "output.dense"])  # fmt: skip
        return peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    if method == "ia3":
        return peft.IA3Config(task_type="SEQ_CLS", fan_in_fan_out=kind == "gpt2")
    cls = peft.PromptTuningConfig if method == "prompt_tuning" else peft.PrefixTuningConfig
    sizes = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4} if kind == "distilbert" else {}
    return cls(task_type="SEQ_CLS", num_virtual_tokens=4, **sizes)


def exchanged(kind: str, method: str) -> bool:
    """peft's prefixes for encoders without a pooler take the cache for the pooled output, or find no cache at all; its
    prompts have to be as wide as the blocks, which ELECTRA's embeddings are not."""
    if method == "prompt_tuning":
        return kind != "electra"
    return not (method in ("prefix_tuning", "p_tuning_v2") and kind in ("roberta", "distilbert", "electra"))


EXCHANGE = [
    (kind, method)
    for kind in (*DECODERS, "bert", "roberta", "electra", "distilbert")
    for method in SHARED
    if exchanged(kind, method)
]


@pytest.mark.parametrize(("kind", "method"), EXCHANGE)
def test_peft_to_ours(kind: str, method: str, tmp_path: Path) -> None:
    base, classifier = base_and_classifier(kind)
    theirs = peft.get_peft_model(classifier, peft_config(kind, method))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs.eval().save_pretrained(tmp_path)
    texts = kit.texts(5, 2, 14, seed=2)
    types = encoder_kit.token_types(kind, texts)
    with torch.no_grad():
        wanted = their_logits(theirs, texts, types)
    adapters = Adapters(base, describe(base))
    adapter = adapters.load("it", tmp_path)
    ours = our_logits(adapters, "it", texts, types)
    kit.measured(f"{kind} {method}: ours - peft", kit.difference(ours, wanted), LIMIT)
    assert adapter.head is not None
    assert adapter.head.task.labels == ("LABEL_0", "LABEL_1", "LABEL_2")  # type: ignore[union-attr]
    plain = Adapters.add(adapters, "plain", kit.method_config("bitfit"), classification=TASK)
    assert plain.head is not None
    plain.head.load_state_dict(adapter.head.state_dict())
    assert kit.difference(ours, our_logits(adapters, "plain", texts, types)) > 1e-3, "the method does nothing"
    adapters.close()


@pytest.mark.parametrize(("kind", "method"), EXCHANGE)
def test_ours_to_peft(kind: str, method: str, tmp_path: Path) -> None:
    base, classifier = base_and_classifier(kind)
    adapters = Adapters(base, describe(base))
    kit.randomize(adapters.add("it", kit.method_config(method), classification=TASK), 5)
    adapters.save("it", tmp_path)
    texts = kit.texts(5, 2, 14, seed=2)
    types = encoder_kit.token_types(kind, texts)
    ours = our_logits(adapters, "it", texts, types)
    theirs = peft.PeftModel.from_pretrained(classifier, tmp_path).eval()
    with torch.no_grad():
        wanted = their_logits(theirs, texts, types)
    kit.measured(f"{kind} {method}: peft - ours", kit.difference(ours, wanted), LIMIT)
    assert set(peft.get_peft_model_state_dict(theirs)) == set(read_tensors(tmp_path / "adapter_model.safetensors"))
    adapters.close()
