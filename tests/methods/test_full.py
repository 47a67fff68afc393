"""Full fine-tuning and freeze: against torch's own training of the whole model, and what each setting chooses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.architecture_configs import make_config
from tests import kit
from tests.models.test_facts import make
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from weft.api import Adapters
from weft.core.stream import Part
from weft.data import Sample
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.methods.own_weights import WeightDelta
from weft.models import describe, load_base
from weft.models.attached import prove_attached
from weft.models.facts import FACTS
from weft.training import Job, JobConfig, Trainer

# Elsewhere transformers casts to float32 inside a float64 model (RMSNorm, rotary angles, ALiBi).
LIMITS = {"gpt2": 1e-9, "opt": 1e-9, "llama": 1e-6, "bloom": 1e-6}


def plain_training(model: Any, job: Job, optimizer: torch.optim.Optimizer) -> None:
    """transformers' model, one sample at a time, torch's optimizer; nothing of ours but the order of the samples."""
    while job.active:
        batches = job.micro_batches()
        divisor = sum(sum(s.weights) for batch in batches for s in batch)
        for batch in batches:
            for sample in batch:
                (sample_loss(model, sample) / divisor).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        job.progress.step += 1
        if job.progress.step == job.total_steps:
            job.progress.ended = "finished"


def sample_loss(model: Any, sample: Sample) -> Tensor:
    logits = model(torch.tensor([sample.input_ids])).logits[0, :-1]
    losses = F.cross_entropy(logits, torch.tensor(sample.input_ids[1:]), reduction="none")
    return (losses * torch.tensor(sample.weights[1:], dtype=losses.dtype)).sum()


# Adam divides what is left of a gradient of zero, in float32 rounding, by itself: a larger eps keeps it small.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4, weight_decay=0.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", LIMITS)
def test_full_is_torchs_training_of_the_whole_model(kind: str, optimizer: str) -> None:
    """W + ΔW after 6 steps, with tied head and embedding (gpt2, opt, bloom) and without (llama)."""
    model = make(kind).double()
    if kind != "bloom":
        model.set_attn_implementation("sdpa")  # eager softmax is float32's
    reference = copy.deepcopy(model)
    config = JobConfig(name="full", method="full", steps=6, batch_size=3, gradient_accumulation_steps=2,
                       optimizer=optimizer, learning_rate={"sgd": 0.05, "adamw": 1e-3}[optimizer],
                       lr_scheduler_type="constant", warmup_ratio=0,
                       adam_epsilon=1e-4)  # fmt: skip
    # Token 0 pads in some of these models, and then learns nothing from being read.
    data = [Sample([i * (i % 5 > 0) for i in s.input_ids], s.weights, s.source) for s in kit.samples(20, 3, 20)]
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("full", config.method_config())
    other = adapters.add("neighbour", config.method_config())
    Trainer(adapters, [Job(config, adapter, data)]).run()
    assert not any(p.any() for p in other.parameters())
    reference.requires_grad_(True)
    plain_training(reference, Job(config, other, data), OPTIMIZERS[optimizer](reference.parameters()))

    merged = merge(model, adapters)
    moved = kit.difference(merged.values(), dict(model.named_parameters()).values())
    worst = kit.difference(merged.values(), dict(reference.named_parameters()).values())
    assert moved > 1e-3
    assert len(merged) == len(list(model.parameters())), "a parameter without a change"
    kit.measured(f"{kind} {optimizer}: W + ΔW - torch's W (moved by {moved:.2g})", worst, LIMITS[kind])
    adapters.close()


def merge(model: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """W + ΔW of every parameter that the adapter changes."""
    tensors = adapters.merge(adapters.names[0]).tensors
    return {n: tensors[n] for n, p in model.named_parameters() if tensors[n].data_ptr() != p.data_ptr()}


@pytest.mark.parametrize(
    ("kind", "tied"),
    kit.in_turn(sorted(FACTS), [pytest.param(True, id="tied"), pytest.param(False, id="untied")]),
)
def test_routed_is_merged(kind: str, tied: bool) -> None:
    """The adapter's logits are those of a model whose tensors are W + ΔW: every kind of module, Gemma's 1 + W too."""
    model = make(kind, tie_word_embeddings=tied).double()
    texts = kit.texts(3, 8, 14)
    adapters = Adapters(model, describe(model))
    kit.randomize(adapters.add("full", kit.method_config("full")), scale=0.05)
    with torch.no_grad():
        found = [adapters.logits(h, [("full", len(h))]) for h in kit.hidden_of(adapters, [Part("full", texts)])]
        merged = merge(model, adapters)
        adapters.close()
        for name, parameter in model.named_parameters():
            parameter.copy_(merged[name])
        plain = Adapters(model, describe(model))
        wanted = [plain.logits(h, [(None, len(h))]) for h in kit.hidden_of(plain, [Part(None, texts)])]
    # Norms that transformers computes in float32 whatever the model's dtype is.
    kit.measured(f"{kind}: routed - merged", kit.difference(found, wanted), 2e-5)


@pytest.mark.parametrize(
    ("method", "kind", "dtype"),
    kit.in_turn(
        ["full", "freeze", "llama_pro", "bitfit"],
        sorted(FACTS),
        [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")],
    ),
)
def test_begins_as_the_base_to_the_bit(method: str, kind: str, dtype: torch.dtype) -> None:
    model = make(kind).to(dtype)
    adapters = Adapters(model, describe(model))
    adapters.add("it", kit.method_config(method))
    texts = kit.texts(3)
    with torch.no_grad():
        pairs = zip(*(kit.hidden_of(adapters, [Part(name, texts)]) for name in ("it", None)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    adapters.close()


def test_a_small_change_of_a_bf16_norm_is_felt() -> None:
    """Added to a bf16 weight of 1, a change of 0.001 would be rounded away."""
    norm = nn.LayerNorm(8, dtype=torch.bfloat16)
    delta = WeightDelta(norm, ["weight"], kit_context(norm))
    x = torch.arange(8.0).bfloat16()[None]
    y = norm(x) * 0
    with torch.no_grad():
        delta.get_parameter("weight_delta").fill_(1e-3)
        assert delta(x, y, None).abs().max() > 1e-3


def kit_context(model: nn.Module) -> Any:
    from weft.core.adapter import BuildContext

    generator, cpu = torch.Generator(), torch.device("cpu")
    return BuildContext(model, None, generator, dtype=torch.float32, device=cpu)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tied_tensors_have_one_change(tied: bool, tmp_path: Path) -> None:
    model = kit.make_model("gpt2", tie_word_embeddings=tied)
    adapters = Adapters(model, describe(model))
    adapter = kit.randomize(adapters.add("it", kit.method_config("full")))
    embedding, head = (dict(adapter.sites())[path].weight_delta for path in ("transformer.wte", "lm_head"))
    assert (embedding is head) == tied
    assert adapter.num_trainable() == sum(p.numel() for p in model.parameters())
    adapters.save("it", tmp_path)
    stored = read_tensors(tmp_path / "adapter_model.safetensors")
    assert len(stored) == len(list(model.parameters()))
    assert ("base_model.model.lm_head.weight_delta" in stored) == (not tied)
    again = adapters.load("again", tmp_path)
    assert kit.difference(adapter.parameters(), again.parameters()) == 0
    adapters.close()


def mixtral() -> Any:
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=kit.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    ).eval()  # fmt: skip


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_what_no_known_module_holds_is_refused_by_name(method: str) -> None:
    model = mixtral()
    adapters = Adapters(model, describe(model))
    with pytest.raises(UserError, match=rf"^{method}: parameter 'model\.layers\.0\.mlp\..*' cannot be trained"):
        adapters.add("it", kit.method_config(method))
    adapters.add("it", kit.METHODS["freeze"](trainable_modules=["self_attn"]))
    adapters.close()


@pytest.mark.parametrize(("kind", "words"), [("bart", "asked once for a whole batch"), ("mvp", "not asked with ids")])
def test_a_table_whose_rows_are_not_the_tokens_is_refused_before_training(
    kind: str, words: str, tmp_path: Path
) -> None:
    """Positions that are made for the whole batch, and an embedding that is called with something else than ids."""
    AutoModelForCausalLM.from_config(make_config(kind), dtype=torch.float32).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), device="cpu", tokenizer=object())
    adapters = Adapters(base.model, base.architecture)
    adapters.add("it", kit.METHODS["full"]())
    with pytest.raises(UserError, match=rf"'model\.decoder\.embed_positions'.* {words}.*lora"):
        prove_attached(adapters, "it")
    adapters.close()


CHOICES: list[tuple[str, dict[str, Any], Callable[[str], bool]]] = [
    ("llama", {}, lambda n: ".1." in n or ".2." in n),
    ("llama", {"num_layers_trainable": 1}, lambda n: ".2." in n),
    ("llama", {"num_layers_trainable": -1}, lambda n: ".0." in n),
    ("llama", {"num_layers_trainable": 1, "trainable_modules": ["mlp"]}, lambda n: ".2.mlp." in n),
    ("llama", {"trainable_modules": ["q_proj"]}, lambda n: "q_proj" in n and ".0." not in n),
    ("llama", {"name_patterns": [r".*\.0\..*(q|v)_proj\.weight"]},
     lambda n: ".0." in n and n.endswith(("q_proj.weight", "v_proj.weight"))),
    ("llama", {"name_patterns": ["mlp.up_proj"]}, lambda n: "up_proj" in n),
    ("llama", {"train_norms": True}, lambda n: "norm" in n),
    ("llama", {"train_head": True}, lambda n: n.startswith("lm_head")),
    ("gpt2", {"train_head": True}, lambda n: n == "transformer.wte.weight"),
    ("gpt2", {"train_embeddings": True}, lambda n: n == "transformer.wte.weight"),
    ("gpt2", {"name_patterns": ["lm_head", "wpe"]}, lambda n: n.endswith(("wte.weight", "wpe.weight"))),
    ("llama", {"num_layers_trainable": 1, "train_norms": True}, lambda n: "norm" in n or ".2." in n),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "chosen"), CHOICES, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_freeze_trains_what_was_chosen(kind: str, settings: dict[str, Any], chosen: Callable[[str], bool]) -> None:
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    adapters.add("it", kit.METHODS["freeze"](**settings))
    wanted = {name for name, _ in model.named_parameters() if chosen(name)}
    assert wanted
    assert set(merge(model, adapters)) == wanted
    adapters.close()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("freeze", {"num_layers_trainable": 4}, "num_layers_trainable 4: this model has 3 blocks, so -3 to 3"),
        ("freeze", {"num_layers_trainable": -4}, "-3 to 3"),
        ("freeze", {"num_layers_trainable": 0}, "nothing to train"),
        ("freeze", {"num_layers_trainable": 0, "trainable_modules": ["mlp"]}, "num_layers_trainable is 0"),
        (
            "freeze",
            {"name_patterns": ["q_porj"]},
            "'q_porj' matches no parameter. Did you mean 'q_proj'",
        ),
        ("freeze", {"trainable_modules": ["mpl"]}, "trainable_modules: 'mpl' matches no parameter. Did you mean 'mlp'"),
        ("freeze", {"name_patterns": ["("]}, "is no regular expression"),
        ("bitfit", {"add_missing": True, "target_modules": ["mpl"]}, "'mpl' matches no bias .* Did you mean 'mlp'"),
        ("bitfit", {"add_missing": True, "target_modules": []}, "target_modules is empty"),
        ("llama_pro", {"num_new_blocks": 4}, "num_new_blocks 4: this model has 3 blocks, so 1 to 3"),
    ],
)
def test_what_cannot_be_says_why(method: str, settings: dict[str, Any], message: str) -> None:
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    with pytest.raises(UserError, match=message):
        adapters.add("it", kit.METHODS[method](**settings))
    adapters.close()


GROUPS = [
    ("gpt2", ["attention"], {"c_attn", "attn.c_proj"}),
    ("gpt2", ["mlp"], {"c_fc", "mlp.c_proj"}),
    ("gpt2", ["norm"], {"ln_1", "ln_2", "ln_f"}),
    ("opt", ["attention"], {"q_proj", "k_proj", "v_proj", "out_proj"}),
    ("opt", ["mlp"], {"fc1", "fc2"}),
    ("opt", ["norm"], {"self_attn_layer_norm", "final_layer_norm"}),
    ("opt", ["q_proj", "fc1"], {"q_proj", "fc1"}),
    ("gpt_neox", ["attention"], {"query_key_value", "attention.dense"}),
    ("gpt_neox", ["mlp"], {"dense_h_to_4h", "dense_4h_to_h"}),
    ("bloom", ["mlp", "norm"], {"dense_h_to_4h", "dense_4h_to_h", "word_embeddings_layernorm", "input_layernorm",
                                "post_attention_layernorm", "ln_f"}),
    ("qwen2", None, {"q_proj", "k_proj", "v_proj"}),
    ("phi", None, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "input_layernorm", "final_layernorm",
                   "q_layernorm", "k_layernorm", "lm_head"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "targets", "wanted"), GROUPS)
def test_bitfit_groups(kind: str, targets: list[str] | None, wanted: set[str]) -> None:
    """Every bias of the chosen modules, and no other."""
    model = make(kind)
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", kit.METHODS["bitfit"](target_modules=targets))
    found = {f"{path}.bias" for path in adapter.sites()}
    ends = tuple(f".{name}.bias" for name in wanted)
    assert found == {name for name, _ in model.named_parameters() if f".{name}".endswith(ends)}
    assert {end for end in ends if any(f".{path}".endswith(end) for path in found)} == set(ends)
    adapters.close()


@pytest.mark.parametrize("method", ["full", "freeze", "bitfit", "llama_pro"])
def test_a_model_without_values_is_enough_to_check_a_configuration(method: str) -> None:
    with torch.device("meta"):
        model = make_meta()
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", kit.method_config(method), blank=True)
    assert all(p.is_meta for p in adapter.parameters())
    real = Adapters(plain := kit.make_model("llama"), describe(plain))
    assert adapter.num_trainable() == real.add("it", kit.method_config(method)).num_trainable()
    adapters.close()
    real.close()


def make_meta() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(kit.model_config("llama")).eval()
