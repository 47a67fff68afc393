"""``weft verify``: sound artefacts pass, and each planted fault is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import kit
from tests.conftest import make_tokenizer
from tests.kit.elsewhere import rendered_here
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from weft.api import Adapters, load_base
from weft.cli.main import main
from weft.errors import UserError
from weft.export.compare import verify_sides
from weft.export.folder import merge_folder
from weft.models.quantize import Quantization

LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def _here() -> Iterator[None]:
    """A process without Weft costs seconds for each merge; ``tests/cli/test_merged_elsewhere.py`` starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.export.folder.fresh_ids", rendered_here)
        yield


@pytest.fixture(scope="module")
def work(tiny_llama_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA adapter (``adapter``) on ``base``, and ``merged``; in ``gpt2`` the same of a model whose matrices
    lie [in, out]."""
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(tiny_llama_dir, folder / "base")
    words = ["train", "--model", folder / "base", "--data", tiny_data, "--method", "lora", "steps=8",
             "learning_rate=0.05", "--output-dir", folder / "run", "--quiet"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    shutil.copytree(folder / "run/adapters/lora", folder / "adapter")
    merge_folder(folder / "adapter", folder / "merged")
    gpt2 = folder / "gpt2"
    tokenizer = make_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=2,
                        bos_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(gpt2 / "base")
    tokenizer.save_pretrained(gpt2 / "base")
    make_adapter(gpt2 / "base", "lora", gpt2 / "adapter", scale=0.02, target_modules=["c_attn", "c_proj"])
    merge_folder(gpt2 / "adapter", gpt2 / "merged")
    (folder / "prompts.txt").write_text("What comes after two?\nCount from one to five.\nWhat colour is the sky?\n")
    return folder


def make_adapter(base: Path, method: str, folder: Path, *, scale: float = 0.1, **more: Any) -> None:
    """An adapter of random values on a base."""
    loaded = load_base(str(base), dtype=more.pop("dtype", "auto"))
    adapters = Adapters(loaded.model, loaded.architecture)
    kit.randomize(adapters.add("it", kit.method_config(method, **more), tokenizer=loaded.tokenizer), scale=scale)
    adapters.save("it", folder)
    adapters.close()


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model's folder with other tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def differences(a: Path, b: Path, prompts: Path | None = None, **more: Any) -> str:
    """What differs, in words."""
    return " | ".join(verify_sides(str(a), str(b), prompts=prompts, **more).differences)


def of_base(work: Path, key: str) -> Tensor:
    return load_file(work / "base/model.safetensors")[key]


def set_entries(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


# -- faults


def wrong_scale(work: Path, folder: Path) -> Path:
    def twice(tensors: dict[str, Tensor]) -> None:
        base = load_file(work / "base/model.safetensors")
        tensors.update({key: 2 * t - base[key] for key, t in tensors.items()})

    return changed(work / "merged", folder, twice)


def missing_module(work: Path, folder: Path) -> Path:
    return changed(work / "merged", folder, lambda t: t.update({LAYER: of_base(work, LAYER)}))


def template_lost(work: Path, folder: Path) -> Path:
    shutil.copytree(work / "merged", folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def template_changed(work: Path, folder: Path) -> Path:
    shutil.copytree(work / "merged", folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>assistant\\n", "<|im_start|>assistant"))
    return folder


def stale_tokenizer(work: Path, folder: Path) -> Path:
    shutil.copytree(work / "merged", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([" after"])
    tokenizer.save_pretrained(folder)
    return folder


def other_end(work: Path, folder: Path) -> Path:
    shutil.copytree(work / "merged", folder)
    set_entries(folder / "tokenizer_config.json", eos_token="<|im_start|>")
    return folder


def wrong_base(work: Path, folder: Path) -> Path:
    return changed(
        work / "merged", folder, lambda t: t.update({key: one + 0.01 for key, one in t.items() if "norm" in key})
    )


def untied_head(work: Path, folder: Path) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        noise = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(0))
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.02 * noise

    set_entries(changed(work / "merged", folder, change) / "config.json", tie_word_embeddings=False)
    return folder


def half_loaded(work: Path, folder: Path) -> Path:
    return changed(work / "merged", folder, lambda t: t["model.embed_tokens.weight"][150:].zero_())


def not_a_number(work: Path, folder: Path) -> Path:
    return changed(work / "merged", folder, lambda t: t[LAYER][0, :3].fill_(float("nan")))


def one_wrong_row(work: Path, folder: Path) -> Path:
    """Of a token that no prompt has."""
    return changed(work / "merged", folder, lambda t: t["model.embed_tokens.weight"][0].add_(0.5))


FAULTS = {
    wrong_scale: "The adapter's change is in B 2 times: with another scale",
    missing_module: f"1 of 21 tensors differ by more than their formats explain, first '{LAYER}' differs",
    template_lost: "B has no chat template, and the other side has one",
    template_changed: "the chat templates differ: from token",
    stale_tokenizer: "the tokenizer of B is another: it has 301 tokens, not 300",
    other_end: "answers end with '<|im_end|>' in A and '<|im_start|>' in B",
    wrong_base: "The adapter leaves this tensor alone. Has B another base?",
    untied_head: "In A it is one tensor with another (a tied head); in B the two are apart",
    half_loaded: "The adapter leaves this tensor alone",
    not_a_number: "3 of its numbers are NaN or infinite in B",
    one_wrong_row: "first 'model.embed_tokens.weight' differs",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named(work: Path, tmp_path: Path, fault: Callable[[Path, Path], Path]) -> None:
    folder = fault(work, tmp_path / "b")
    found = differences(work / "adapter", folder, work / "prompts.txt")
    assert FAULTS[fault] in found
    if fault is missing_module:
        assert "The adapter's change is missing in B" in found


def transposed(tensors: dict[str, Tensor]) -> None:
    key = "transformer.h.0.attn.c_proj.weight"
    tensors[key] = tensors[key].t().clone()


def change_transposed(tensors: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    key = "transformer.h.1.attn.c_proj.weight"
    tensors[key] = base[key] + (tensors[key] - base[key]).t()


def test_transposed_matrices(work: Path, tmp_path: Path) -> None:
    """A square one shows in its numbers, whole or in its change; of another one the shape tells."""
    gpt2, prompts = work / "gpt2", work / "prompts.txt"
    found = differences(gpt2 / "adapter", changed(gpt2 / "merged", tmp_path / "whole", transposed), prompts)
    assert "first 'transformer.h.0.attn.c_proj.weight' differs" in found
    assert "It is transposed: the other way round the two are alike" in found
    base = load_file(gpt2 / "base/model.safetensors")
    folder = changed(gpt2 / "merged", tmp_path / "change", lambda tensors: change_transposed(tensors, base))
    found = differences(gpt2 / "adapter", folder, prompts)
    assert "1 of 29 tensors" in found
    assert "The adapter's change is in B, but transposed" in found
    key = "transformer.h.0.attn.c_attn.weight"
    folder = changed(gpt2 / "merged", tmp_path / "shape", lambda tensors: tensors.update({key: tensors[key].t()}))
    with pytest.raises(UserError, match=rf"{key} is \(96, 32\), its config.json says \(32, 96\). It is transposed"):
        verify_sides(str(gpt2 / "adapter"), str(folder))


def test_half_a_file(work: Path, tmp_path: Path) -> None:
    """A folder that lacks tensors is refused; a renamed one shows on both sides."""

    def lose(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "layers.1" in key]:
            del tensors[key]

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.down_project.weight"] = tensors.pop(LAYER)

    with pytest.raises(UserError, match=r"lacks 9 of its tensors: model\.layers\.1\.input_layernorm"):
        verify_sides(str(work / "adapter"), str(changed(work / "merged", tmp_path / "half", lose)))
    wanted = rf"lacks 1 of its tensors: {LAYER}; its files hold 1 tensor \(model\.layers\.1\.mlp\.down_project"
    with pytest.raises(UserError, match=wanted):
        verify_sides(str(work / "adapter"), str(changed(work / "merged", tmp_path / "renamed", rename)))
    whole = (work / "merged/model.safetensors").read_bytes()
    shutil.copytree(work / "merged", tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot be loaded: .* is not whole: tensor"):
        verify_sides(str(work / "adapter"), str(tmp_path / "cut"))


def test_a_change_that_the_format_rounds_away(work: Path, tmp_path: Path) -> None:
    """Each number is as near as it can be, and yet the adapter is gone."""
    base, prompts = tmp_path / "base", work / "prompts.txt"
    shutil.copytree(work / "base", base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    make_adapter(base, "lora", tmp_path / "small", scale=2e-4)
    found = differences(tmp_path / "small", base, prompts)
    assert "the format has rounded it away" in found
    make_adapter(base, "lora", tmp_path / "large", scale=0.1)
    merge_folder(tmp_path / "large", tmp_path / "merged")
    assert differences(tmp_path / "large", tmp_path / "merged", prompts) == ""
    # In 16 bits, too, a wrong scale is found and told.
    plain = load_file(base / "model.safetensors")

    def half(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: ((t.float() + plain[key].float()) / 2).bfloat16() for key, t in tensors.items()})

    found = differences(tmp_path / "large", changed(tmp_path / "merged", tmp_path / "half", half), prompts)
    assert "times: with another scale" in found
    assert "logits differ: first at prompt" in found


def test_a_merge_onto_the_base_before_it_was_quantised(work: Path, tmp_path: Path) -> None:
    """The adapter learned beside dequantised weights; others are off by far more than its change."""
    pytest.importorskip("bitsandbytes")
    words = ["train", "--model", work / "base", "--data", work / "prompts.jsonl", "--method", "lora", "steps=2",
             "quantization=nf4", "dtype=float32", "--output-dir", tmp_path / "run", "--quiet"]  # fmt: skip
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three", "four")]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(word) for word in words]) == 0
    adapter, prompts = tmp_path / "run/adapters/lora", work / "prompts.txt"
    merge_folder(adapter, tmp_path / "merged")
    assert differences(adapter, tmp_path / "merged", prompts) == ""
    assert "tensors differ by more than their formats explain" in differences(adapter, work / "base", prompts)
    # A folder that is kept in four bits, beside the one that it was made of, and beside that one's base.
    four = Quantization("nf4").config(torch.float32)
    AutoModelForCausalLM.from_pretrained(work / "merged", quantization_config=four).save_pretrained(tmp_path / "four")
    AutoTokenizer.from_pretrained(work / "merged").save_pretrained(tmp_path / "four")
    assert differences(work / "merged", tmp_path / "four", prompts) == ""
    assert "logits differ" in differences(work / "base", tmp_path / "four", prompts)
    # A plain model in four bits differs from itself by what the format explains, and an int8 one too.
    for kind in ("nf4", "int8"):
        assert differences(work / "base", work / "base", prompts, quantization=kind) == ""
        assert differences(work / "merged", work / "base", prompts, quantization=kind)


SOUND = kit.in_turn(
    ["llama-lora", "llama-llama_pro", "llama-trainable_tokens", "gpt2-lora", "gpt2-bitfit", "gpt2-ia3", "gpt2-full"],
    ["float32", "bfloat16", "float16"],
)


@pytest.mark.parametrize(("what", "dtype"), SOUND)
def test_sound_artefacts(work: Path, tmp_path: Path, what: str, dtype: str) -> None:
    """A few; ``benchmarks/verify_sound.py`` has 266, with 1, 2 and 4 threads and two builds of torch."""
    kind, method = what.split("-")
    base = work / "base" if kind == "llama" else work / "gpt2/base"
    make_adapter(
        base, method, tmp_path / "adapter", scale=0.02, **({"add_missing": False} if method == "bitfit" else {})
    )
    merge_folder(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    verdict = verify_sides(str(tmp_path / "adapter"), str(tmp_path / "merged"), prompts=work / "prompts.txt")
    assert verdict.differences == ()


def test_what_the_command_says(work: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Exit codes 0, 4 and 2; one JSON object; a run with one adapter stands for it."""
    code = main(["verify", str(work / "run"), str(work / "merged"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (code, told["equal"], told["differences"]) == (0, True, [])
    assert told["proof"]["prompts"] == 20
    assert told["greedy"] == {"tokens": 48, "same": 48}
    assert told["weights"]["kept"] == pytest.approx(1, abs=1e-6)
    code = main(["verify", str(work / "base"), str(work / "merged"), "--prompts", str(work / "prompts.txt")])
    out = capsys.readouterr().out
    assert code == 4
    assert "differs: " in out
    assert out.endswith("not equal\n")
    for words, message in (
        (["x.gguf", str(work / "merged")], "there is no file x.gguf"),
        (["http://127.0.0.1:1", "http://127.0.0.1:1"], "are both servers"),
        ([str(work / "merged"), "nowhere/at/all"], "no model at"),
        ([str(work / "merged"), "http://127.0.0.1:1/v1"], "does not answer"),
        ([str(work / "merged"), str(work / "merged"), "--quantization", "int4"], "one of nf4"),
        ([str(work / "merged"), str(work / "merged"), "--prompts", "nowhere.txt"], "nowhere.txt"),
        ([str(work / "merged"), str(work / "merged"), "--model", str(work / "base")], "--model is the base of an"),
        ([str(work / "merged"), str(work / "merged"), "--api-key-env", "HOME"], "--api-key-env is for a server"),
        ([str(work / "merged"), "http://127.0.0.1:1", "--quantization", "nf4"], "--quantization is for how B is"),
    ):
        assert main(["verify", *words]) == 2
        assert message in capsys.readouterr().err


def test_an_answer_ends_before_a_token_that_one_side_lacks(work: Path, tmp_path: Path) -> None:
    """What A writes behind it follows a text that B cannot be given; all else of these two is the same."""
    model = AutoModelForCausalLM.from_pretrained(work / "merged")
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 1, mean_resizing=False)
    tokenizer = AutoTokenizer.from_pretrained(work / "merged")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What comes after two?"}], add_generation_prompt=True, return_dict=False
    )
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=1, do_sample=False)[0, -1]
    with torch.no_grad():
        model.get_input_embeddings().weight[rows] = 1.01 * model.get_input_embeddings().weight[answer]
    model.save_pretrained(tmp_path / "longer")
    tokenizer.save_pretrained(tmp_path / "longer")
    greedy = verify_sides(str(tmp_path / "longer"), str(work / "merged"), prompts=work / "prompts.txt").greedy
    assert 0 < greedy.same == greedy.tokens < 24  # three prompts, eight tokens each
