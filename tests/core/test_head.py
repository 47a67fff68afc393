"""Heads: where they answer, what a sample teaches them, what it weighs."""

from __future__ import annotations

import torch
from tests import kit
from tests.kit.encoders import make_encoder

from weft.api import Adapters
from weft.core.stream import Part
from weft.data import Sample
from weft.heads.classification import ClassificationTask
from weft.models import describe

TASK = ClassificationTask(("bad", "good"))


def test_tokens_are_predicted_by_the_row_before_them() -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    adapters.add("prompt", kit.method_config("prompt_tuning"))
    samples = [Sample([5, 6, 7], [0.0, 0.5, 1.0], "a"), Sample([8, 9], [0.0, 1.0], "b")]
    stream = adapters.stream([Part("prompt", [s.input_ids for s in samples])])
    head, virtual = adapters.head("prompt"), adapters["prompt"].num_virtual_tokens
    batch = head.learned(stream, samples, [0, 1])
    assert batch.rows.tolist() == [virtual, virtual + 1, 2 * virtual + 3]
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.weights.tolist() == [0.5, 1.0, 1.0]
    assert batch.sequence.tolist() == [0, 0, 1]
    assert [head.loss_weight(sample) for sample in samples] == [1.5, 1.0]
    assert head.loss_weight(Sample([5], [0.0], "c", target_ids=(4, 4, 1))) == 3.0
    assert head.rows(stream, [1]) == [2 * virtual + 3, 2 * virtual + 4]
    assert head.writes
    assert head == adapters.head(None)
    adapters.close()


def test_a_class_is_said_where_all_has_been_seen() -> None:
    """At the last row of a decoder's sequence, at the first of an encoder's."""
    for model, wanted in ((kit.make_model("llama"), [2, 4]), (make_encoder("roberta"), [0, 3])):
        adapters = Adapters(model, describe(model))
        head = adapters.add("it", kit.method_config("bitfit"), head=TASK).head
        samples = [Sample([5, 6, 7], [0.0] * 3, "a", label=1), Sample([8, 9], [0.0] * 2, "b", label=0)]
        stream, hidden = adapters.run([Part("it", [s.input_ids for s in samples])])
        batch = head.learned(stream, samples, [0, 1])
        assert batch.rows.tolist() == head.rows(stream, [0, 1]) == wanted
        assert (batch.targets.tolist(), batch.weights.tolist()) == ([1, 0], [1.0, 1.0])
        states, unused = hidden[batch.rows], object()
        logits = head.logits(states, unused)  # type: ignore[arg-type]
        expected = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        assert torch.equal(head.losses(states, batch.targets, unused), expected)  # type: ignore[arg-type]
        assert (head.labels, head.writes, head.loss_weight(samples[0])) == (TASK.labels, False, 1.0)
        adapters.close()


def test_parts_are_the_methods() -> None:
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    one, two = (adapters.add(name, kit.method_config(name)) for name in ("lora", "bitfit"))
    assert one.parts == (one,)
    assert one.config.methods() == (one.config,)
    stack = adapters.stack("both", ["lora", "bitfit"])
    assert stack.parts == (one, two)
    assert stack.config.methods() == (one.config, two.config)
    adapters.close()
