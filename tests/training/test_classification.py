"""Classification jobs: heads exchanged with peft, jobs of both tasks in one pass, whole runs on both kinds of base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from tests.kit import encoders as encoder_kit
from tests.kit.encoders import make_encoder, their_logits
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from weft.api import Adapters
from weft.core.stream import Part
from weft.data import Sample
from weft.errors import UserError
from weft.evaluate import predict
from weft.files.adapter_folder import read_tensors
from weft.generation import Request, generate
from weft.heads.classification import ClassificationTask
from weft.methods import METHODS
from weft.models import describe
from weft.objectives import class_metrics
from weft.objectives.passes import answer_logits, evaluate
from weft.training import Job, JobConfig, Trainer

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
        return list(answer_logits(adapters, name, stream, adapters.forward(stream), range(len(texts))))


def peft_config(kind: str, method: str) -> peft.PeftConfig:
    if method == "lora":
        targets = {"gpt2": ["c_attn"], "bloom": ["query_key_value"], "llama": ["q_proj", "down_proj"],
                   "distilbert": ["q_lin", "lin2"]}.get(kind, ["query", "output.dense"])  # fmt: skip
        return peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    if method == "ia3":
        targets = {"electra": (["key", "value"], ["output.dense"]), "distilbert": (["k_lin", "v_lin"], ["lin2"])}
        both, last = targets.get(kind, (None, []))  # peft has defaults for the others
        more = {"target_modules": both + last, "feedforward_modules": last} if both else {}
        return peft.IA3Config(task_type="SEQ_CLS", fan_in_fan_out=kind == "gpt2", **more)
    cls = peft.PromptTuningConfig if method == "prompt_tuning" else peft.PrefixTuningConfig
    sizes = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4} if kind == "distilbert" else {}
    return cls(task_type="SEQ_CLS", num_virtual_tokens=4, **sizes)


# DistilBERT takes no cache, which peft's prefixes need; peft's prompts have to be as wide as the blocks, which those of
# ELECTRA's embeddings are not.
NOT_IN_PEFT = {("distilbert", "prefix_tuning"), ("distilbert", "p_tuning_v2"), ("electra", "prompt_tuning")}
EXCHANGE = [
    (kind, method)
    for kind in (*DECODERS, "bert", "roberta", "electra", "distilbert")
    for method in SHARED
    if (kind, method) not in NOT_IN_PEFT
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
    assert adapter.head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    plain = Adapters.add(adapters, "plain", kit.method_config("bitfit"), head=TASK)
    plain.head.load_state_dict(adapter.head.state_dict())
    assert kit.difference(ours, our_logits(adapters, "plain", texts, types)) > 1e-3, "the method does nothing"
    adapters.close()


@pytest.mark.parametrize(("kind", "method"), EXCHANGE)
def test_ours_to_peft(kind: str, method: str, tmp_path: Path) -> None:
    base, classifier = base_and_classifier(kind)
    adapters = Adapters(base, describe(base))
    kit.randomize(adapters.add("it", kit.method_config(method), head=TASK), 5)
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


@pytest.mark.parametrize("kind", [*DECODERS, "bert", "roberta", "electra"])
def test_pefts_prefix_in_transformers_own_classifier(kind: str, tmp_path: Path) -> None:
    """Also where peft's classifier does not take the argument as this transformers names it."""
    base, classifier = base_and_classifier(kind)
    theirs = peft.get_peft_model(classifier, peft_config(kind, "prefix_tuning"))
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.normal_(std=0.5)
    theirs.eval().save_pretrained(tmp_path)
    texts = kit.texts(5, 2, 14, seed=2)
    types = encoder_kit.token_types(kind, texts)
    with torch.no_grad():
        wanted = encoder_kit.logits_with_pefts_prefix(theirs, texts, types)
        without = their_logits(theirs.get_base_model(), texts, types)
    adapters = Adapters(base, describe(base))
    adapters.load("it", tmp_path)
    kit.measured(f"{kind} prefix", kit.difference(our_logits(adapters, "it", texts, types), wanted), LIMIT)
    assert kit.difference(wanted, without) > 1e-3, "the prefix does nothing"
    adapters.close()


def test_what_peft_cannot_do_is_still_so() -> None:
    """The cases that the exchange leaves out; when one of these works, it belongs there."""
    for kind, method in sorted(NOT_IN_PEFT):
        _, classifier = base_and_classifier(kind)
        with pytest.raises((ValueError, TypeError, AttributeError, RuntimeError)):
            their_logits(peft.get_peft_model(classifier, peft_config(kind, method)), kit.texts(1))


def classified(count: int, seed: int = 0, classes: int = 3) -> list[Sample]:
    """Texts whose class is that of their first token."""
    texts = kit.texts(count, 3, 14, seed)
    return [Sample(ids, [0.0] * len(ids), f"text {i}", label=ids[0] % classes) for i, ids in enumerate(texts)]


def job(adapters: Adapters, name: str, method: str, samples: list[Sample], **settings: Any) -> Job:
    """A job over ``samples``, which says by itself whether it classifies."""
    task = TASK if samples[0].label is not None else None
    given = kit.method_config(method).model_dump(mode="json")
    config = JobConfig(name=name, method=method, method_settings=given, seed=len(name), batch_size=4, steps=5,
                       learning_rate=0.01, **settings)  # fmt: skip
    adapter = adapters.add(name, config.method_config(), seed=len(name), head=task)
    return Job(config, adapter, samples, samples[:5])


@pytest.mark.parametrize(
    ("options", "kind"), kit.in_turn([{}, {"exact": True}, {"checkpointing": True}], ["llama", "bert"])
)
def test_jobs_of_both_tasks_together_are_what_they_are_alone(kind: str, options: dict[str, bool]) -> None:
    """Language modelling and classification, all in one pass of one base."""
    model = make_encoder(kind, torch.float64) if kind == "bert" else kit.make_model(kind, torch.float64)
    wanted: list[tuple[str, str, list[Sample]]] = [
        ("a_lora", "lora", classified(11)), ("some_prefix", "prefix_tuning", classified(9, 1)),
        ("biases", "bitfit", classified(10, 2)),
    ]  # fmt: skip
    if kind == "llama":
        wanted.insert(1, ("writes", "lora", kit.samples(9, seed=4)))

    def trained(jobs: list[tuple[str, str, list[Sample]]]) -> dict[str, dict[str, Tensor]]:
        adapters = Adapters(model, describe(model), **options)
        made = [job(adapters, *one) for one in jobs]
        Trainer(adapters, made).run()
        found = {j.name: kit.parameters(j.adapter) for j in made}
        adapters.close()
        return found

    together = trained(wanted)
    for one in wanted:
        alone = trained([one])[one[0]]
        assert alone.keys() == together[one[0]].keys()
        difference = kit.difference(alone.values(), together[one[0]].values())
        kit.measured(f"{kind} {one[0]} {options}: together - alone", difference, 1e-10)
        if options.get("exact"):
            assert difference == 0
    assert "head.weight" in together["a_lora"]


def test_the_gradient_is_that_of_the_mean_over_texts() -> None:
    """Not over tokens, and not a mean of the means of micro-batches."""
    model = kit.make_model("llama", torch.float64)
    adapters = Adapters(model, describe(model))
    samples = classified(7)
    one = job(adapters, "it", "lora", samples, gradient_accumulation_steps=2, optimizer="sgd", momentum=0.0,
              max_grad_norm=0, lr_scheduler_type="constant", warmup_ratio=0)  # fmt: skip
    before = kit.parameters(one.adapter)
    order = [sample for micro in one.micro_batches() for sample in micro]
    assert len(order) == 7
    Trainer(adapters, [one], should_stop=lambda: one.progress.step == 1).run()
    after = kit.parameters(one.adapter)
    with torch.no_grad():
        for name, parameter in one.adapter.named_parameters():
            parameter.copy_(before[name])
    stream = adapters.stream([Part("it", [s.input_ids for s in order])])
    logits = answer_logits(adapters, "it", stream, adapters.forward(stream), range(7))
    loss = -logits.log_softmax(-1)[torch.arange(7), [s.label for s in order]].mean()
    loss.backward()
    for name, gradient in kit.gradients(one.adapter).items():
        kit.measured(name, float((before[name] - 0.01 * gradient - after[name]).abs().max()), 1e-12)
    adapters.close()


@pytest.mark.parametrize(
    ("method", "settings"),
    [("prompt_tuning", {}), ("prefix_tuning", {"prefix_projection": True}), ("bitfit", {}), ("lora+bitfit", {})],
)
def test_the_head_has_a_rate_of_its_own(method: str, settings: dict[str, Any]) -> None:
    """At a prompt's 0.2 its logits would run away. A rate that the job names is for the head too."""
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    for number, named in enumerate((None, 0.5)):
        config = JobConfig(name=f"it{number}", method=method, method_settings=settings, task="sequence_classification",
                           steps=1, learning_rate=named)  # fmt: skip
        adapter = adapters.add(config.name, config.method_config(), head=TASK)
        made = Job(config, adapter, classified(2)).optimizer
        assert made is not None
        rates = {id(p): group["peak_lr"] for group in made.param_groups for p in group["params"]}
        head = {rates[id(p)] for name, p in adapter.named_parameters() if name.startswith("head.")}
        assert head == {named or 2e-3}
        others = [rates[id(p)] for name, p in adapter.named_parameters() if not name.startswith("head.")]
        assert others
        if named is None and adapter.parts[0] is adapter:
            share = {"prefix_tuning": 80, "bitfit": 3}.get(method, 1)
            assert set(others) == {METHODS[method].learning_rate(32) / share}
        if named is None and method == "lora+bitfit":
            assert min(others) == METHODS["lora"].learning_rate(32)
            assert max(others) == METHODS["bitfit"].learning_rate(32) / 3


@pytest.mark.parametrize("method", ["prompt_tuning", "bitfit", "lora+prompt_tuning"])
def test_a_job_goes_on_with_the_rates_of_its_beginning(method: str) -> None:
    """Also one of an earlier version, which wrote none down: its head learned as fast as the method."""
    settings = {"bitfit": {"add_missing": True}}.get(method, {"num_virtual_tokens": 2})
    config = JobConfig(name="it", method=method, method_settings=settings, task="sequence_classification", steps=2)
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    job = Job(config, adapters.add("it", config.method_config(), head=TASK), classified(2))
    begun, tensors = job.state(), job.tensors()

    def rates() -> list[float]:
        assert job.optimizer is not None
        found = {id(p): group["peak_lr"] for group in job.optimizer.param_groups for p in group["params"]}
        return [found[id(p)] for p in job.parameters]

    shown = job.rate
    other = [rate / (2 + number) for number, rate in enumerate(begun["rates"])]
    job.restore(tensors, {**begun, "rates": other})
    assert rates() == other
    assert job.rate == pytest.approx(shown / 2)
    job.restore(tensors, {key: value for key, value in begun.items() if key != "rates"})
    of_method = METHODS[method.split("+")[0]].learning_rate(32)
    head = [rate for name, rate in zip(names_of(job), rates(), strict=True) if name.startswith("head.")]
    assert set(head) == {of_method}
    if "+" not in method:
        assert set(rates()) == {of_method}


def names_of(job: Job) -> list[str]:
    return [name for name, p in job.adapter.named_parameters() if p.requires_grad]


def test_figures_of_success() -> None:
    assert class_metrics([1, 1, 0, 1], [1, 0, 0, 1]) == pytest.approx(
        {
            "accuracy": 0.75,
            "majority": 0.5,
            "macro_f1": (4 / 5 + 2 / 3) / 2,
            "f1": 4 / 5,
            "mcc": (2 * 1 - 1 * 0) / (3 * 2 * 1 * 2) ** 0.5,
        }
    )
    # One answer for all: no correlation, whatever the share.
    assert class_metrics([0, 0, 0], [0, 1, 0]) == pytest.approx(
        {"accuracy": 2 / 3, "majority": 2 / 3, "macro_f1": 2 / 5, "f1": 0.0, "mcc": 0.0}
    )
    # Three classes: the mean of 2/3, 2/3 and 1; MCC by hand: c = 3, n = 4, p = (1, 2, 1), t = (2, 1, 1).
    found = class_metrics([0, 1, 1, 2], [0, 0, 1, 2])
    assert found == pytest.approx(
        {"accuracy": 0.75, "majority": 0.5, "macro_f1": 7 / 9, "f1": 7 / 9, "mcc": 7 / (10 * 10) ** 0.5}
    )


def test_predictions_are_those_that_evaluation_counts() -> None:
    model = make_encoder("roberta")
    adapters = Adapters(model, describe(model))
    kit.randomize(adapters.add("it", kit.method_config("prefix_tuning"), head=TASK), 1)
    samples = classified(23)
    small, large = (predict(adapters, "it", samples, max_tokens=size) for size in (20, 4096))
    assert small.labels == large.labels
    assert small.names == TASK.labels
    torch.testing.assert_close(large.probabilities.sum(-1), torch.ones(23))
    found = evaluate(adapters, "it", samples, max_tokens=50)
    assert found is not None
    assert found.metrics == class_metrics(large.labels, [s.label for s in samples if s.label is not None])
    chosen = large.probabilities[torch.arange(23), [s.label for s in samples]]
    assert found.loss == pytest.approx(float(-chosen.log().mean()), abs=1e-5)
    assert predict(adapters, "it", []).labels == []
    with pytest.raises(UserError, match="exceed the model's 62 positions"):
        predict(adapters, "it", [Sample([5] * 60, [0.0] * 60, "a long one")])
    adapters.add("writer", kit.method_config("lora"))
    with pytest.raises(UserError, match="'writer' has no classes"):
        predict(adapters, "writer", samples)
    adapters.close()


def test_a_classifier_on_a_decoder_writes_no_text() -> None:
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    adapters.add("it", kit.method_config("lora"), head=TASK)
    with pytest.raises(UserError, match="'it' was trained to classify; it writes no text"):
        generate(adapters, [Request([3, 4], "it")], stop_ids=())
    generate(adapters, [Request([3, 4], None, 2)], stop_ids=())
    adapters.close()
