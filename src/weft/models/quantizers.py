"""What transformers' loader asks of a quantisation that it does not have itself: 4 bits that are made fast on a CPU and
in blocks of other sizes, and checkpoints by GPTQ and AWQ, for which it needs packages with kernels of their own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from weft.base.in_file import numbers_in_file
from weft.base.kinds import is_linear, linear_shape
from weft.base.packed import PackedLinear
from weft.errors import UserError
from weft.foreign import check_safetensors
from weft.ops.four_bit import quantize_weight
from weft.ops.words import Packing

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

_BLOCKS, _PACKED = "weft_blocks", "weft_packed"


def blocks_config(block_size: int, **options: Any) -> BitsAndBytesConfig:
    """transformers' configuration for 4 bits in blocks of this size, made by ``quantize_weight``."""
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig(**options)
    _register_blocks()
    config.quant_method = _BLOCKS
    config.block_size = block_size
    found: BitsAndBytesConfig = config
    return found


@functools.cache
def _register_blocks() -> None:
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class Blocks(Bnb4BitHfQuantizer):
        """4 bits in bitsandbytes' format. What is loaded is as if transformers had done it."""

        def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
            super()._process_model_before_weight_loading(model, *args, **kwargs)
            for parameter in model.parameters():
                if hasattr(parameter, "quant_state"):
                    parameter.blocksize = self.quantization_config.block_size  # type: ignore[attr-defined]

        def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
            _name_bitsandbytes(self.quantization_config)
            method = self.quantization_config.quant_method
            setattr(model, "quantization_method", method)  # noqa: B010
            return super()._process_model_after_weight_loading(model, **kwargs)

        def get_quantize_ops(self) -> Any:
            return _quantizing(self)

    register_quantizer(_BLOCKS)(Blocks)


def _quantizing(quantizer: Any) -> Any:
    """transformers' step between a weight that is read and the one that is put into the model."""
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    class Quantize(Bnb4bitQuantize):
        """As its own, with ``quantized_parameter`` for bitsandbytes' function."""

        def convert(self, input_dict: Any, *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
            found = {}
            for name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                module = model.get_submodule(name.rpartition(".")[0])
                found[name] = quantized_parameter(outputs_first(weight, module), module.weight)
                module._is_hf_initialized = True
            return found

    return Quantize(quantizer)


def outputs_first(weight: Tensor, module: nn.Module) -> Tensor:
    """The weight [out, in] of a quantised linear's file: that of a Conv1D is stored the other way round."""
    turned = getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"
    return weight.t() if turned else weight


def quantized_parameter(weight: Tensor, like: Any) -> Any:
    """bitsandbytes' parameter of a weight [out, in] as its file has it, made by the options of another one."""
    from bitsandbytes.nn import Params4bit

    told = {"block": like.blocksize, "nested": like.compress_statistics, "storage": like.quant_storage}
    with numbers_in_file(weight) as read:
        packed, state = quantize_weight(weight, like.quant_type, read=read, **told)
    made: Any = Params4bit
    options = {**like.__dict__, "quant_state": state, "bnb_quantized": True}
    if like.module is not None:
        like.module.quant_state = state
    return made(packed, requires_grad=False, **options)


def _name_bitsandbytes(config: Any) -> None:
    """Leave the block size out of a configuration: the stored tensors name theirs, and every reader takes it there."""
    from transformers.utils.quantization_config import QuantizationMethod

    del config.block_size
    config.quant_method = QuantizationMethod.BITS_AND_BYTES


def empty_linears(model: nn.Module, config: Any) -> None:
    """Give a model the linears of a quantisation by bitsandbytes, without weights; its configuration says so.

    Args:
        config: as ``Quantization.config`` gives it.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationMethod

    usual = f"{QuantizationMethod.BITS_AND_BYTES.value}_{8 if config.load_in_8bit else 4}bit"
    made: Any = AUTO_QUANTIZER_MAPPING[_BLOCKS if config.quant_method == _BLOCKS else usual]
    quantizer: Any = made(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    if config.quant_method == _BLOCKS:
        _name_bitsandbytes(config)
    cast(Any, model).config.quantization_config = config


def packed_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration by which transformers' loader makes ``PackedLinear`` of a checkpoint's tensors.

    Args:
        entries: the checkpoint's own, of GPTQ or AWQ (``vetting.check_packed`` has seen them).
    """
    _register_packed()
    return {"quant_method": _PACKED, "own": dict(entries)}


def put_packed(model: PreTrainedModel, headers: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Put a ``PackedLinear`` in the place of every linear of a model on the meta device whose packed weight is stored.

    Args:
        headers: what the files say of each of their tensors (``foreign.check_safetensors``).
        own: the entries of the checkpoint's configuration.

    Raises:
        UserError: None is stored, or one in other shapes than the model's.
    """
    found = [key.removesuffix(".qweight") for key in headers if key.endswith(".qweight")]
    if not found:
        raise UserError(f"its config.json says {own['quant_method']}, and its files hold no tensor of that (qweight).")
    modules = dict(model.named_modules())
    for name in found:
        path = name if name in modules else f"{model.base_model_prefix}.{name}"
        module: Any = modules.get(path)
        if module is None or not is_linear(module):
            raise UserError(f"its files hold {name}.qweight, and the model has no linear module there.")
        new = _packed_linear(name, module, {key.rpartition(".")[2]: told for key, told in headers.items()
                                            if key.rpartition(".")[0] == name}, own)  # fmt: skip
        new.source_cls = type(module)  # type: ignore[assignment]
        model.set_submodule(path, new)


def _packed_linear(name: str, module: nn.Module, told: Mapping[str, Any], own: Mapping[str, Any]) -> PackedLinear:
    (inputs, outputs), bits = linear_shape(module), int(own.get("bits", 4))
    awq = own["quant_method"] == "awq"
    packing: Packing = "awq" if awq else "gptq_v2" if own.get("checkpoint_format") == "gptq_v2" else "gptq"
    size = int(own.get("group_size", 128))
    size = inputs if size == -1 else size
    groups = -(-inputs // size)
    shapes = {
        "qweight": (inputs, outputs * bits // 32) if awq else (inputs * bits // 32, outputs),
        "qzeros": (groups, outputs * bits // 32),
        "scales": (groups, outputs),
        **({"g_idx": (inputs,)} if "g_idx" in told else {}),
    }
    tensors = {}
    for key, shape in shapes.items():
        stored = told.get(key)
        if not isinstance(stored, dict) or tuple(stored.get("shape", ())) != shape:
            there = f"{tuple(stored.get('shape', ()))}" if isinstance(stored, dict) else "not there"
            raise UserError(f"{name}.{key} is {there}; for {bits} bits in groups of {size} it must be {shape}.")
        kind = torch.float32 if stored.get("dtype") == "F32" else torch.float16
        kind = torch.bfloat16 if stored.get("dtype") == "BF16" else kind
        tensors[key] = torch.empty(shape, dtype=kind if key == "scales" else torch.int32, device="meta")
    bias = module._parameters.get("bias") is not None
    with torch.device("meta"):
        return PackedLinear(inputs, outputs, tensors, bits=bits, group_size=size, packing=packing, bias=bias)


@functools.cache
def _register_packed() -> None:
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):
        """The entries of ``packed_entries``."""

        def __init__(self, own: Mapping[str, Any], **kwargs: Any) -> None:
            self.quant_method, self.own = _PACKED, dict(own)  # type: ignore[assignment]

    class Packed(HfQuantizer):
        """Checkpoints by GPTQ and AWQ, read as they are."""

        requires_calibration = False

        def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
            headers: dict[str, Any] = {}
            for file in kwargs["checkpoint_files"]:
                headers |= check_safetensors(file)
            put_packed(model, headers, self.quantization_config.own)  # type: ignore[attr-defined]

        def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
            own: dict[str, Any] = self.quantization_config.own  # type: ignore[attr-defined]
            model.config.quantization_config = own
            setattr(model, "quantization_method", own["quant_method"])  # noqa: B010
            return model

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    register_quantization_config(_PACKED)(Config)
    register_quantizer(_PACKED)(Packed)
