"""Forgetting and memory: the loss of plain text is torch's own, and the bytes are those that autograd keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.methods import saved_bytes
from tests import kit
from tests.kit.tokenizers import byte_tokenizer

from weft.api import Adapters
from weft.data import Renderer, Sample
from weft.errors import UserError
from weft.evaluate.classify import classes_of, predict
from weft.evaluate.forgetting import read_documents, text_samples
from weft.models import describe
from weft.objectives.passes import evaluate_loss
from weft.training.step import Work


def test_a_document_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("one\\ntwo\n\n  \nthree\n")
    assert read_documents(path) == ["one\ntwo", "three"]


def test_every_token_of_a_document_counts() -> None:
    tokenizer = byte_tokenizer()
    (sample,) = text_samples(Renderer(tokenizer), ["abc"])
    assert sample.source == "document 1"
    assert tokenizer.decode(sample.input_ids) == "abc</s>"
    assert sample.weights == [0.0, 1.0, 1.0, 1.0], "all but the first, which nothing predicts"


def test_the_loss_is_the_mean_over_tokens_and_an_adapters_own() -> None:
    """Not a mean of the documents' means; an adapter that does nothing forgets nothing."""
    model = kit.make_model("llama", torch.float64)
    texts = kit.texts(4, 3, 14)
    with torch.no_grad():
        sums = [torch.nn.functional.cross_entropy(model(torch.tensor([t])).logits[0, :-1], torch.tensor(t[1:]),
                                                  reduction="sum") for t in texts]  # fmt: skip
    wanted = float(sum(sums)) / sum(len(t) - 1 for t in texts)
    samples = [Sample(ids, [0.0] + [1.0] * (len(ids) - 1), "d") for ids in texts]
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", kit.method_config("lora"))
    # transformers computes norms and angles in float32 whatever the dtype.
    assert evaluate_loss(adapters, None, samples) == pytest.approx(wanted, rel=1e-6)
    assert evaluate_loss(adapters, "it", samples) == evaluate_loss(adapters, None, samples)
    kit.randomize(adapter)
    assert abs(evaluate_loss(adapters, "it", samples) - wanted) > 1e-4


def test_bytes_for_the_backward_pass() -> None:
    """An adapter keeps more than the frozen base does, which keeps nothing; twice the text, twice the bytes."""
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    adapters.add("it", kit.method_config("lora"))
    one, two = kit.samples(1, 10, 10), kit.samples(2, 10, 10)
    found = [saved_bytes(adapters, Work(name, some)) for name, some in ((None, one), ("it", one), ("it", two))]
    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(2 * found[1], rel=0.2)


def test_only_what_was_trained_to_classify_has_classes() -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    adapters.add("it", kit.method_config("lora"))
    for ask in (lambda: classes_of(adapters, "it"), lambda: predict(adapters, "it", [])):
        with pytest.raises(UserError, match="'it' has no classes"):
            ask()
