"""Configuration: files, overrides, keys of other tools, and the reference page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from weft import foreign
from weft.cli import reference
from weft.errors import UserError
from weft.methods import METHODS
from weft.models.quantize import Quantization
from weft.training.aliases import RENAMED, SWITCHES, translate
from weft.training.checks import check_names
from weft.training.config import JobConfig, RunConfig, build_config, load_config, make_config

BASE = {"model": "m", "data": "d", "method": "lora"}


def job(**settings: Any) -> JobConfig:
    """The one job of a configuration with these keys at the top."""
    return make_config({**BASE, **settings}).jobs[0]


def run(**settings: Any) -> RunConfig:
    return make_config({**BASE, **settings})


def test_method_keys_go_to_the_jobs_that_know_them() -> None:
    config = make_config({**BASE, "method": ["lora", "prompt_tuning"], "r": 4, "num_virtual_tokens": 7, "epochs": 2})
    lora, prompt = config.jobs
    assert lora.method_settings == {"r": 4}
    assert prompt.method_settings == {"num_virtual_tokens": 7}
    assert lora.epochs == prompt.epochs == 2
    assert lora.learning_rate is None  # the method's own, which depends on the base


def test_a_job_wins_over_the_top() -> None:
    values = {**BASE, "r": 4, "seed": 5, "jobs": [{"name": "a", "r": 8}, {"name": "b", "seed": 6}]}
    a, b = make_config(values).jobs
    assert (a.method_settings["r"], a.seed, b.method_settings["r"], b.seed) == (8, 5, 4, 6)


@pytest.mark.parametrize(
    ("theirs", "where", "ours", "value"),
    [
        # transformers, TRL, LLaMA-Factory
        ({"lora_rank": 5}, "method", "r", 5),
        ({"lora_r": 5}, "method", "r", 5),
        ({"lora_alpha": 5}, "method", "lora_alpha", 5),
        ({"lora_dropout": 0.5}, "method", "lora_dropout", 0.5),
        ({"lora_target": "all"}, "method", "target_modules", "all-linear"),
        ({"lora_target": "q_proj, v_proj"}, "method", "target_modules", ["q_proj", "v_proj"]),
        ({"lora_target_modules": ["q_proj"]}, "method", "target_modules", ["q_proj"]),
        ({"lora_target_linear": True}, "method", "target_modules", "all-linear"),
        ({"per_device_train_batch_size": 5}, "job", "batch_size", 5),
        ({"gradient_accumulation_steps": 5}, "job", "gradient_accumulation_steps", 5),
        ({"num_train_epochs": 5}, "job", "epochs", 5),
        ({"max_steps": 5}, "job", "steps", 5),
        ({"max_steps": -1}, "job", "steps", None),
        ({"lr_scheduler_type": "constant_with_warmup"}, "job", "lr_scheduler_type", "constant"),
        ({"warmup_ratio": 0.5}, "job", "warmup_ratio", 0.5),
        ({"eval_steps": 5}, "job", "eval_steps", 5),
        ({"adam_beta2": 0.95}, "job", "adam_betas", (0.9, 0.95)),
        ({"optim": "adamw_torch"}, "job", "optimizer", "adamw"),
        ({"max_length": 50}, "run", "max_length", 50),
        ({"cutoff_len": 50}, "run", "max_length", 50),
        ({"assistant_only_loss": False}, "run", "train_on", "all"),
        ({"completion_only_loss": None}, "run", "train_on", "answers"),
        ({"train_on_prompt": True}, "run", "train_on", "all"),
        ({"mask_history": True}, "run", "train_on", "last_answer"),
        ({"bf16": True}, "run", "dtype", "bfloat16"),
        ({"fp16": False}, "run", "dtype", "auto"),
        ({"save_steps": 5}, "run", "save_steps", 5),
        ({"save_total_limit": 5}, "run", "save_total_limit", 5),
        ({"logging_steps": 5}, "run", "logging_steps", 5),
        ({"resume_from_checkpoint": True}, "run", "resume", True),
        ({"overwrite_output_dir": True}, "run", "overwrite_output_dir", True),
        ({"report_to": "none"}, "run", "resume", False),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "run",
         "gradient_checkpointing", True),
        ({"gradient_checkpointing": 0}, "run", "gradient_checkpointing", False),
        ({"gradient_checkpointing": "on"}, "run", "gradient_checkpointing", True),
        ({"gradient_checkpointing": 3}, "run", "gradient_checkpointing", 3),
        ({"gradient_checkpointing": "cheap", "activation_offloading": "disk"}, "run", "offload_activations", "disk"),
        ({"enable_activation_checkpointing": True, "enable_activation_offloading": True}, "run", "offload_activations",
         "cpu"),
        ({"disable_gradient_checkpointing": False}, "run", "gradient_checkpointing", True),
        ({"load_in_4bit": False}, "run", "quantization", None),
        ({"load_in_4bit": True}, "run", "quantization", "nf4"),
        ({"quantization_bit": 8}, "run", "quantization", "int8"),
        ({"use_modelscope": True}, "run", "hub", "modelscope"),
        ({"packing": True, "max_length": 50}, "job", "batch_tokens", 400),
        ({"packing": True, "neat_packing": True, "cutoff_len": 50, "batch_size": 2}, "job", "batch_tokens", 100),
        ({"packing": False}, "job", "batch_tokens", None),
        # axolotl
        ({"sequence_len": 50}, "run", "max_length", 50),
        ({"micro_batch_size": 5}, "job", "batch_size", 5),
        ({"num_epochs": 5}, "job", "epochs", 5),
        ({"train_on_inputs": True}, "run", "train_on", "all"),
        ({"sample_packing": True, "sequence_len": 64, "micro_batch_size": 2}, "job", "batch_tokens", 128),
        # swift
        ({"padding_free": True}, "run", "exact", False),
        ({"loss_scale": "last_round"}, "run", "train_on", "last_answer"),
        ({"torch_dtype": "bfloat16"}, "run", "dtype", "bfloat16"),
    ],
)
def test_keys_of_other_tools(theirs: dict[str, Any], where: str, ours: str, value: Any) -> None:
    config = run(**theirs)
    found = {"run": config, "job": config.jobs[0]}.get(where)
    assert (config.jobs[0].method_settings[ours] if found is None else getattr(found, ours)) == value


@pytest.mark.parametrize(
    ("method", "key", "knows"),
    [
        ("bitfit", "r", "lora"),
        ("lora", "num_virtual_tokens", "prefix_tuning"),
        ("lora+ia3", "bottleneck", "bottleneck"),
    ],
)
def test_a_setting_that_no_job_takes(method: str, key: str, knows: str) -> None:
    values = {"model": "m", "data": "d.jsonl"}
    with pytest.raises(UserError, match=rf"{key}: no job's method takes it.* These do: .*\b{knows}\b"):
        make_config({**values, "method": method, key: {} if key == "bottleneck" else 8})
    assert make_config({**values, "method": [method, knows], key: {} if key == "bottleneck" else 8})


def test_a_key_stands_once_in_a_message() -> None:
    with pytest.raises(UserError, match=r"^configuration: data: .* sum to 0\.9"):
        make_config({"model": "m", "data": "0.5*a.jsonl + 0.4*b.jsonl", "method": "lora"})


@pytest.mark.parametrize("key", ["model_name_or_path", "base_model", "model"])
@pytest.mark.parametrize("method", [("finetuning_type", "lora"), ("adapter", "lora"), ("tuner_type", "lora"),
                                    ("train_type", "lora"), ("peft_type", "LORA"), ("use_peft", True)])  # fmt: skip
def test_model_and_method_of_other_tools(key: str, method: tuple[str, Any]) -> None:
    config = make_config({key: "m", "dataset": "d", method[0]: method[1]})
    assert (config.model, config.data, config.jobs[0].method) == ("m", "d", "lora")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 1, "learning_rate": 2}, "'lr' and 'learning_rate' mean the same"),
        ({"bf16": True, "fp16": True}, "'bf16' and 'fp16' mean the same"),
        ({"quantization_bit": 3}, "a base is kept in 4 .nf4. or 8 bits"),
        ({"resume_from_checkpoint": "out/checkpoint-3"}, "newest intact checkpoint"),
        ({"loss_scale": "hermes"}, "loss_scale"),
        ({"packing": True}, "max_length is not given"),
        ({"packing": True, "batch_tokens": 64}, "'packing' and 'batch_tokens' mean the same"),
        ({"batch_tokens": True}, "batch_tokens: expected"),
        ({3: 4}, "key 3 is not text"),
        ({"lora_alpa": 4}, "unknown key 'lora_alpa'. Did you mean 'lora_alpha'?"),
        ({"jobs": [{"method": "prompt_tuning", "r": 4}]}, r"jobs\[0\]: unknown key 'r'"),
        ({"jobs": []}, "jobs"),
        ({"gradient_checkpointing": -2}, "gradient_checkpointing"),
        ({"gradient_checkpointing": "offload_disk"}, "true and offload_activations: disk are that"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"early_stop": False}}, "use_reentrant"),
        ({"offload_activations": "disk"}, "offload_activations needs gradient_checkpointing"),
        ({"adam_betas": [0.9, 1.5]}, "adam_betas"),
        ({"name": "a/b"}, "no name for an adapter"),
        ({"method": 3}, "no method"),
        ({"learning_rate": "fast", "epochs": 0}, "(?s)learning_rate.*fast.*epochs|epochs.*learning_rate"),
    ],
)
def test_refused(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config({**BASE, **values})


@pytest.mark.parametrize(("settings", "message"), [({"name": "base"}, "the base itself"), ({"seed": 2**63}, "64 bits")])
def test_names_and_seeds_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        job(**settings)


def test_a_message_names_the_file_and_the_job(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\njobs:\n- method: lora\n- {method: lora, name: b, r: x}\n")
    with pytest.raises(UserError, match=r"run.yaml: jobs\[1\]: r: .*'x'"):
        load_config(path)


def test_overrides() -> None:
    values = {**BASE, "lr": 1.0, "jobs": [{"name": "a"}, {"method": "prefix_tuning"}]}
    words = ["learning_rate=1e-3", "jobs.0.lora_rank=3", "jobs.prefix_tuning.seed=9", "eval_data=", "jobs.a.epochs=2",
             "columns={prompt: question}", "adam_beta1=0.8", "adam_beta2=0.9", "exact=true"]  # fmt: skip
    config = build_config(values, words)
    a, prefix = config.jobs
    assert a.learning_rate == prefix.learning_rate == 1e-3
    assert a.method_settings == {"r": 3}
    assert (a.epochs, prefix.epochs, prefix.seed) == (2, 3, 9)
    assert config.eval_data is None
    assert config.columns == {"prompt": "question"}
    assert a.adam_betas == (0.8, 0.9)
    assert config.exact is True


def test_overrides_reach_jobs_that_come_from_a_list_of_methods() -> None:
    config = build_config({**BASE, "method": ["lora", "bitfit"]}, ["jobs.0.r=3", "jobs.bitfit.add_missing=true"])
    assert [job.method_settings for job in config.jobs] == [{"r": 3}, {"add_missing": True}]


def test_flags_win_over_the_file_and_overrides_over_flags() -> None:
    values = {**BASE, "model_name_or_path": "file", "output_dir": "file"}
    del values["model"]
    config = build_config(values, ["output_dir=word"], flags={"model": "flag", "output_dir": "flag"})
    assert (config.model, config.output_dir) == ("flag", "word")


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "jobs:\n- {r: 1, r: 2}\n"])
def test_a_key_twice_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match="stands twice"):
        load_config(tmp_path / "run.yaml")


def test_yaml_anchors_work(tmp_path: Path) -> None:
    text = "model: m\ndata: d\njobs:\n- &a {name: a, method: lora, seed: 3}\n- {<<: *a, name: b}\n"
    (tmp_path / "run.yaml").write_text(text)
    assert [job.seed for job in load_config(tmp_path / "run.yaml").jobs] == [3, 3]


def test_an_alias_never_hides_a_key_of_ours() -> None:
    ours = {*RunConfig.model_fields, *JobConfig.model_fields}
    assert not ours & {*RENAMED, *SWITCHES}
    known = ours | {key for cls in METHODS.values() for key in cls.model_fields}
    assert set(RENAMED.values()) <= known
    assert translate({"model": "m"}, "here") == {"model": "m"}


def test_the_reference_is_whole_and_up_to_date() -> None:
    for cls in (RunConfig, JobConfig, *METHODS.values()):
        for key, field in cls.model_fields.items():
            assert field.description or key == "method_settings", f"{cls.__name__}.{key}: give it a description"
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == reference.config_markdown(), (
        "run: python -m weft.cli.reference > docs/config.md"
    )


def test_the_example_of_the_reference_is_valid() -> None:
    example = reference.config_markdown().split("```yaml\n")[1].split("```")[0]
    config = make_config(yaml.safe_load(example))
    assert [job.name for job in config.jobs] == ["small", "prefix_tuning"]


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"freeze_trainable_layers": 3}, {"num_layers_trainable": 3}),
        ({"num_layer_trainable": -2, "freeze_trainable_modules": "all"}, {"num_layers_trainable": -2}),
        ({"freeze_trainable_modules": "mlp,self_attn"}, {"trainable_modules": ["mlp", "self_attn"]}),
        ({"name_module_trainable": ["mlp"]}, {"trainable_modules": ["mlp"]}),
        ({"freeze_extra_modules": "embed_tokens, lm_head"}, {"name_patterns": ["embed_tokens", "lm_head"]}),
    ],
)
def test_llama_factorys_words_for_freeze(given: dict, settings: dict) -> None:
    (job,) = build_config({"model": "m", "data": "d", "finetuning_type": "freeze", **given}).jobs
    assert job.method == "freeze"
    assert job.method_settings == settings
    job.method_config()


def built(text: str, *overrides: str) -> RunConfig:
    return build_config(
        foreign.parse_yaml("model: m\ndata: d\n" + ("" if "method:" in text.split() else "method: lora\n") + text, ""),
        overrides,
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(("word", "on"), [("yes", True), ("On", True), ("true", True), ("no", False), ("OFF", False)])
def test_switches_know_yes_and_no(word: str, on: bool) -> None:
    for config in (built(f"exact: {word}\nuse_dora: {word}"), built("", f"exact={word}", f"jobs.0.use_dora={word}")):
        assert config.exact is on
        assert config.jobs[0].method_config().use_dora is on  # type: ignore[attr-defined]
    assert built(f"init_lora_weights: {word}").jobs[0].method_config().init_lora_weights is on  # type: ignore[attr-defined]
    both = built(f"method: bitfit+lora\nlora: {{use_dora: {word}}}").jobs[0].method_config().methods()
    assert both[1].use_dora is on  # type: ignore[attr-defined]


def test_words_of_yaml_that_are_text() -> None:
    assert built("audit: off").audit == built("", "audit=off").audit == "off"
    config = built("", "jobs=[{name: on, method: lora}]", "labels=[yes, no]", "task=sequence_classification")
    assert config.jobs[0].name == "on"
    assert config.jobs[0].labels == ["yes", "no"]
    with pytest.raises(UserError, match="there is no template 'no'"):
        check_names(built("chat_template: no"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("audit: false", "audit: expected one of error, warn, off, not false"),
        ("audit: of", "audit: expected one of error, warn, off, not 'of'. Did you mean 'off'?"),
        ("quantization: nf5", "quantization: expected one of nf4, fp4, int8, not 'nf5'. Did you mean 'nf4'?"),
        ("optimizer: adamv", "optimizer: expected one of adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, "
            "adafactor, lion, sgd, apollo, not 'adamv'. Did you mean 'adamw'?"),
        ("exact: perhaps", "exact: expected true or false, not 'perhaps'"),
        ("batch_size: true", "batch_size: expected a whole number, not true"),
        ("packing: perhaps", "packing: expected yes or no, not 'perhaps'"),
        ("chat_template: true", "chat_template: expected text, not true"),
    ],
)
def test_no_message_names_a_type_of_python(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        built(line)
    assert message in str(caught.value)
    assert not re.search(r"Literal|literal|\bbool|\bint\b|\bstr\b|\bdict", str(caught.value))


@pytest.mark.parametrize(
    ("lines", "quantization", "dtype"),
    [
        ("load_in_4bit: true", "nf4", "auto"),
        ("load_in_4bit: yes\nbnb_4bit_quant_type: fp4\nbnb_4bit_use_double_quant: true", "fp4", "auto"),
        ("load_in_4bit: true\nbnb_4bit_compute_dtype: torch.bfloat16\nbf16: true", "nf4", "bfloat16"),
        ("load_in_4bit: true\nbnb_4bit_compute_dtype: float16", "nf4", "float16"),
        ("load_in_8bit: true\nbnb_4bit_quant_type: nf4", "int8", "auto"),
        ("load_in_4bit: false\nbnb_4bit_quant_type: nf4\nbnb_4bit_use_double_quant: false", None, "auto"),
        ("quantization_bit: 4\nquantization_type: fp4\nquantization_method: bnb", "fp4", "auto"),
        ("quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: fp4}", "fp4", "auto"),
    ],
)
def test_keys_for_bits(lines: str, quantization: str | None, dtype: str) -> None:
    config = built(lines)
    assert (config.quantization, config.dtype) == (quantization, dtype)
    assert built("load_in_4bit: true", "bnb_4bit_quant_type=fp4").quantization == "fp4"


@pytest.mark.parametrize(
    ("lines", "details"),
    [
        ("load_in_4bit: true\nbnb_4bit_use_double_quant: no\nbnb_4bit_blocksize: 128", (False, 128, None)),
        ("quantization_bit: 4\ndouble_quantization: false", (False, 64, None)),
        ("quantization: fp4\nbf16: true\nbnb_4bit_compute_dtype: float32", (True, 64, "float32")),
        ("load_in_4bit: true\nbnb_4bit_compute_dtype: bf16\nfp16: true", (True, 64, "bfloat16")),
    ],
)
def test_details_of_four_bits(lines: str, details: tuple[bool, int, str | None]) -> None:
    kept = built(lines).kept
    assert kept is not None
    assert (kept.double, kept.block_size, kept.compute_dtype) == details
    assert Quantization.recorded(kept.record(), "here") == kept
    again = built(lines, "bnb_4bit_use_double_quant=true").kept
    assert again is not None
    assert (again.kind, again.double, again.compute_dtype) == (kept.kind, True, details[2])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("load_in_4bit: true\nload_in_8bit: true", "'load_in_4bit' and 'load_in_8bit' both say"),
        ("load_in_4bit: true\nbnb_4bit_quant_type: nf5", "nf4, fp4"),
        ("load_in_4bit: true\nbnb_4bit_quant_storage: bfloat16", "uint8"),
        ("load_in_4bit: true\nbnb_4bit_compute_dtype: float16\ndtype: float32\nquantization_dtype: bf16", "keep one"),
        ("load_in_8bit: true\nquantization_block_size: 128", "is for 4 bits"),
        ("quantization_bit: 4\nquantization_method: hqq", "'hqq' is not in this version"),
        ("optim: muon", "'muon' is not in this version.*adamw, adamw_8bit"),
        ("optim: adamw_torch_8bit", "8 bits"),
        ("lr_scheduler_type: greedy", "not in this version.*constant, linear, cosine"),
        ("lr_scheduler_type: linear\nlr_scheduler_kwargs: {num_cycles: 2}", "linear has no option 'num_cycles'"),
    ],
)
def test_other_tools_words_that_are_refused(lines: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(lines)


@pytest.mark.parametrize(
    ("word", "ours"),
    [("adamw_torch", "adamw"), ("adamw_torch_fused", "adamw"), ("adamw_hf", "adamw"), ("sgd", "sgd"),
     ("adamw_bnb_8bit", "adamw_8bit"), ("paged_adamw_32bit", "paged_adamw"), ("paged_adamw_8bit", "paged_adamw_8bit"),
     ("adafactor", "adafactor"), ("lion_32bit", "lion"), ("apollo_adamw", "apollo")],
)  # fmt: skip
def test_optimizers_of_transformers(word: str, ours: str) -> None:
    config = built(f"optim: {word}\nlr_scheduler_type: constant_with_warmup").jobs[0]
    assert (config.optimizer, config.lr_scheduler_type) == (ours, "constant")


def test_options_of_optimizers_and_schedules() -> None:
    lines = "optim: apollo_adamw\noptim_args: rank=64,scale_type=tensor\nlr_scheduler_type: cosine_with_restarts"
    job = built(lines + "\nlr_scheduler_kwargs: {num_cycles: 2}").jobs[0]
    assert job.optimizer_kind.model_dump(include={"rank", "scale_type"}) == {"rank": 64, "scale_type": "tensor"}
    assert job.schedule.model_dump() == {"num_cycles": 2}
