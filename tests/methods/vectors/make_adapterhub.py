"""Make the vectors of ``test_bottleneck.py`` with the real ``adapters`` package: tiny bases, adapters as its
``save_adapter`` writes them, and the logits it gives.

Not run by the tests: ``adapters`` pins an older transformers. In an environment of its own::

    pip install torch adapters==1.3.0 safetensors
    python tests/methods/vectors/make_adapterhub.py            # writes beside itself
    python tests/methods/vectors/make_adapterhub.py read FOLDER...   # logits that adapters gives for folders of ours
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

HERE = Path(__file__).parent
NAME = "hub"
PRE_LN: dict[str, tuple[str, dict[str, Any]]] = {
    "houlsby": ("double_seq_bn", {"reduction_factor": 4}),
    "pfeiffer": ("seq_bn", {"reduction_factor": 4}),
    "parallel": ("par_bn", {"reduction_factor": 4}),
    "scaled_parallel": ("scaled_par_bn", {"reduction_factor": 4, "mh_adapter": True}),
    "norms": ("seq_bn", {"reduction_factor": 4, "ln_before": True, "ln_after": True, "scaling": 0.5}),
    "residual_inside": ("double_seq_bn", {"reduction_factor": 8, "ln_after": True, "adapter_residual_before_ln": True}),
    "late_residual": ("seq_bn", {"reduction_factor": 4, "residual_before_ln": False}),
    "adapter_plus": ("adapter_plus", {"reduction_factor": 4, "stochastic_depth": 0.0}),
    "per_layer": ("double_seq_bn", {"reduction_factor": {"1": 2, "default": 100}, "leave_out": [0],
                                    "non_linearity": "leakyrelu"}),
    "parallel_norms": ("par_bn", {"reduction_factor": 4, "ln_before": True, "ln_after": True, "scaling": "channel",
                                  "original_ln_after": False, "non_linearity": "gelu_new"}),
}  # fmt: skip
POST_LN = {**PRE_LN, "post_add": ("seq_bn", {"reduction_factor": 4, "residual_before_ln": "post_add"})}
SMALL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "max_position_embeddings": 32},
    "qwen2": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "max_position_embeddings": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "bert": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
             "max_position_embeddings": 32},
}  # fmt: skip
FEW = ("houlsby", "pfeiffer", "parallel")
# Where not all are tried. Into Qwen2 and BLOOM, adapters hooks; it then refuses original_ln_after: false.
TRIED = {
    "qwen2": ("pfeiffer",),
    "bloom": ("pfeiffer", "parallel"),
    "gpt2": FEW,
    "bert": ("pfeiffer", "late_residual", "post_add", "adapter_plus", "parallel_norms"),
}
# A model that adapters knows nothing of.
INTERFACES = {
    "bloom": adapters.AdapterModelInterface(
        adapter_methods=["bottleneck"], model_embeddings="word_embeddings", model_layers="h",
        layer_self_attn="self_attention", layer_cross_attn=None, attn_qkv_proj="query_key_value", attn_o_proj="dense",
        layer_intermediate_proj="mlp.dense_h_to_4h", layer_output_proj="mlp.dense_4h_to_h",
        layer_pre_self_attn="input_layernorm", layer_pre_ffn="post_attention_layernorm",
    )
}  # fmt: skip


def variants(kind: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The configurations that are tried on one base."""
    return {key: POST_LN[key] for key in TRIED.get(kind, PRE_LN)}


def move(parameters: Any, seed: int, scale: float) -> None:
    """Away from zeros and ones, which hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def base(kind: str) -> Any:
    """The base with random weights, from its files if they are there."""
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **SMALL, **BASES[kind]))
    stored = HERE / kind / "base.safetensors"
    if stored.exists():
        model.load_state_dict(load_file(stored), strict=False)
        model.tie_weights()
    else:
        move(model.parameters(), 1, 0.2)
    return model.eval()


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter once: tied ones under their first name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def make(kind: str) -> None:
    """All files of one base."""
    folder = HERE / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ids = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(2))
    model = base(kind)
    save_file(weights(model), folder / "base.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **SMALL, **BASES[kind]}, indent=2) + "\n")
    with torch.no_grad():
        logits = {"input_ids": ids, "base": model(ids).logits.clone()}
    for seed, (variant, (preset, changes)) in enumerate(variants(kind).items()):
        model = base(kind)
        adapters.init(model, interface=INTERFACES.get(kind))
        known = adapters.ADAPTER_CONFIG_MAP.get(preset) or adapters.AdapterPlusConfig()
        model.add_adapter(NAME, config=known.replace(**changes))
        move((p for name, p in model.named_parameters() if f"adapters.{NAME}." in name), seed, 0.3)
        model.set_active_adapters(NAME)
        with torch.no_grad():
            logits[variant] = model(ids).logits.clone()
        save(model, folder / variant)
    save_file(logits, folder / "logits.safetensors")


def save(model: Any, folder: Path) -> None:
    """As adapters writes it; where it cannot write safetensors (a norm under two names), its pickle's tensors."""
    try:
        model.save_adapter(str(folder), NAME, with_head=False, use_safetensors=True)
    except RuntimeError as error:
        print(f"{folder.parent.name} {folder.name}: {str(error).strip()[:150]}")
        model.save_adapter(str(folder), NAME, with_head=False)
        tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        save_file({key: value.clone() for key, value in tensors.items()}, folder / "adapter.safetensors")
        (folder / "pytorch_adapter.bin").unlink()
    (folder / "adapter_interface.json").unlink(missing_ok=True)


def read(folder: Path) -> None:
    """Load an adapter folder of ours in adapters; write what it gives beside it."""
    kind = json.loads((folder / "adapter_config.json").read_text())["model_type"]
    model = base(kind)
    adapters.init(model, interface=INTERFACES.get(kind))
    info: dict[str, Any] = {}
    name = model.load_adapter(str(folder), use_safetensors=True, set_active=True, loading_info=info)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    ids = load_file(HERE / kind / "logits.safetensors")["input_ids"]
    with torch.no_grad():
        save_file({"logits": model(ids).logits.clone()}, folder / "by_adapters.safetensors")
    print(f"{folder}: read as '{name}'")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["read"]:
        for path in sys.argv[2:]:
            read(Path(path))
    else:
        for kind in BASES:
            make(kind)
