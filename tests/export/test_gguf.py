"""GGUF of a model: llama.cpp computes what transformers does, and the file holds what it was made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.conftest import make_tokenizer
from tests.kit.tokenizers import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.assets import model_path
from weft.errors import UserError
from weft.export import gguf_file, llama_cpp
from weft.export.gguf_file import FORMATS, read_settings, write_gguf
from weft.export.gguf_model import gguf_model
from weft.export.gguf_tokenizer import CUTS, trial_texts

gguf = pytest.importorskip("gguf")

SHARED = Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
ASKED = "What colour is the sky? 今天 it's 12."
# A number that may be off by rounding of 32 bits alone, in another order of sums.
EXACT = 2e-5


def model_of(kind: str, folder: Path, **more: Any) -> Path:
    """A model with random weights, biases and norms, and a tokenizer of its size."""
    tokenizer = make_tokenizer()
    model = kit.make_model("llama" if kind == "qwen3" else kind, **more) if kind != "qwen3" else qwen3()
    model.resize_token_embeddings(len(tokenizer) + 4, mean_resizing=False)  # rows without a token, as many models have
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=kit.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama of wide heads": ("llama", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama, stretched": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
}


def transformers_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind: str, tmp_path: Path) -> None:
    """The layout of q and k, offsets of norms, biases, positions: a fault in any is far beyond rounding."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    name, more = KINDS[kind]
    folder = model_of(name, tmp_path / "model", **more)
    write_gguf(gguf_model(folder, "f32"), tmp_path / "model.gguf")
    ids = (AutoTokenizer.from_pretrained(folder)(ASKED)["input_ids"] * 4)[:100]
    proof = llama_cpp.prove(tmp_path / "model.gguf", [(ids, transformers_logits(folder, ids))])
    # llama.cpp looks Gemma's activation up in a table of 16 bits.
    kit.measured(f"llama.cpp - transformers, {kind}", proof.difference, 5e-4 if kind == "gemma" else EXACT)
    assert proof.agreement == 1


def test_logits_that_are_not_finite_prove_nothing(tmp_path: Path) -> None:
    """One NaN among a hundred positions, and a next text without any."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = model_of("llama", tmp_path / "model")
    write_gguf(gguf_model(folder, "f32"), tmp_path / "model.gguf")
    ids = (AutoTokenizer.from_pretrained(folder)(ASKED)["input_ids"] * 4)[:100]
    right = transformers_logits(folder, ids)
    wrong = right.clone()
    wrong[0, 0] = float("nan")
    with pytest.raises(UserError, match="not the model that it was made of"):
        llama_cpp.prove(tmp_path / "model.gguf", [(ids, wrong), (ids, right)])


@pytest.mark.parametrize("kind", FORMATS)
def test_pre_trained_models_and_their_tokenizers(kind: str, tmp_path: Path) -> None:
    """Greedy tokens and ids of the trial's texts in llama.cpp: byte-level BPE, and SentencePiece where the data is."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    stories = SHARED / "models/stories260K"
    for folder in [model_path("tiny-llama"), *([stories] if stories.is_dir() else [])]:
        path = tmp_path / f"{folder.name}.gguf"
        write_gguf(gguf_model(folder, kind), path)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = tokenizer("Once upon a time, there was")["input_ids"]
        wanted = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids) :].tolist()
        with llama_cpp.opened(path, 200) as opened:
            found = list(ids)
            while len(found) < len(ids) + len(wanted):
                found.append(int(llama_cpp.logits(opened, found)[-1].argmax()))
            # Eight bits may decide otherwise where two tokens are about as likely.
            length = len(wanted) if kind != "q8_0" else 8
            assert found[len(ids) :][:length] == wanted[:length]
            for text in trial_texts():
                plain = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert opened.tokenize(text.encode(), add_bos=False, special=True) == plain, text
            assert opened.token_eos() == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", FORMATS)
def test_read_back_by_the_gguf_package(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is there within its format's rounding, and a file that holds another is refused."""
    folder, path = model_path("tiny-llama"), tmp_path / "model.gguf"
    content = gguf_model(folder, kind)
    write_gguf(content, path)
    settings = read_settings(path)
    assert settings["general.architecture"] == "llama"
    assert settings["llama.attention.head_count_kv"] == 2
    assert settings["tokenizer.ggml.eos_token_id"] == 0
    assert settings["tokenizer.chat_template"] == AutoTokenizer.from_pretrained(folder).chat_template
    assert "output.weight" not in content.tensors
    content.tensors["blk.0.ffn_up.weight"] = content.tensors["blk.0.ffn_up.weight"] * 1.02
    with pytest.raises(UserError, match=r"'blk\.0\.ffn_up\.weight' is not what it was made of"):
        gguf_file.check_file(path, content)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        gguf_file.check_file(path, content)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("gpt2", {}, "gpt2 models are not written as GGUF"),
        ("mistral", {"sliding_window": 16}, "sliding_window: 16"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type: dynamic",
        ),
    ],
)
def test_what_is_not_proved_is_refused(kind: str, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = model_of(kind, tmp_path / "model", **more)
    with pytest.raises(UserError, match=message):
        gguf_model(folder, "f32")


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    folder = model_of("llama", tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("a"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"BPE after Split, ByteLevel\) is none that llama.cpp gives the ids of"):
        gguf_model(folder, "f32")


@pytest.mark.parametrize("cut", CUTS)
def test_llama_cpp_cuts_texts_alike(cut: str, tmp_path: Path) -> None:
    """A tokenizer that cuts texts as the name says, with joined pieces of many scripts, gets the same ids there."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    steps = [pre_tokenizers.Split(Regex(one), "isolated") for one in CUTS[cut]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(trial_texts() * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    model = kit.make_model("llama")
    model.resize_token_embeddings(len(fast), mean_resizing=False)
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    content = gguf_model(tmp_path, "f16")
    assert content.settings["tokenizer.ggml.pre"] == cut
    write_gguf(content, tmp_path / "model.gguf")
    with llama_cpp.opened(tmp_path / "model.gguf", 8) as opened:
        for text in [*trial_texts(), "end</s>of <s> one", "  </s>  x"]:
            plain = fast(text, add_special_tokens=False)["input_ids"]
            assert opened.tokenize(text.encode(), add_bos=False, special=True) == plain, text


def test_numbers_that_sixteen_bits_cannot_hold(tmp_path: Path) -> None:
    folder = model_of("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"'blk.0.ffn_up.weight' holds 1e\+05, and f16 ends at 65504"):
        gguf_model(folder, "f16")
    write_gguf(gguf_model(folder, "bf16"), tmp_path / "model.gguf")
