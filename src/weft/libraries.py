"""The only place for code that depends on the version of a library.

Each function looks at the installed library (the parameters of a forward, the fields of an output) and compares no
version numbers. Between transformers 5.17 and 5.24 the argument and the output ``past_key_values`` became ``cache``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, cat, nn
from torch.utils import _python_dispatch

from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

# The newest name first: where a library understands both, the older one is deprecated.
CACHE_NAMES = ("cache", "past_key_values")


def multiplies_sixteen_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has kernels for products in this dtype here: oneDNN's, which needs a CPU's instructions. Without
    them it goes number by number. Where it cannot be asked, the product is left to torch."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    return _has_kernels("bf16" if dtype == torch.bfloat16 else "fp16")


@functools.cache
def _has_kernels(kind: str) -> bool:
    asks = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return True if asks is None else bool(asks())


def has_kernel(operator: str, device: torch.device) -> bool:
    """Whether an operator of a library that is imported, ``library::name``, runs on a device."""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.type.upper())
    return found


def alias_of(x: Tensor) -> Tensor:
    """x [...] without its graph, in the same memory: what is written to one counts as written to the other.

    Also where operations are intercepted below autograd, and a plain ``detach`` would count by itself.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return x.detach()


@contextlib.contextmanager
def without_mode(mode: object) -> Iterator[None]:
    """Inside, operations are not told to a dispatch mode, if it is the one that would be told first."""
    if _python_dispatch._get_current_dispatch_mode() is not mode:
        yield
        return
    with _python_dispatch._pop_mode_temporarily():
        yield


def cache_name(forward: Callable[..., object]) -> str | None:
    """The parameter of a model's (or an attention's) forward that takes its cache; None if it has none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_arguments(forward: Callable[..., object], cache: object) -> dict[str, object]:
    """The arguments by which ``forward`` uses ``cache``; if that is None, those by which it makes none.

    Raises:
        UserError: A cache is given and the forward takes none.
    """
    if cache is None:
        return {"use_cache": False}
    name = cache_name(forward)
    if name is None:
        kind = getattr(forward, "__qualname__", "this model").removesuffix(".forward")
        raise UserError(f"{kind} takes no cache of keys and values, which is where learned prefixes go in.")
    return {name: cache, "use_cache": True}


def given_cache(arguments: Mapping[str, object]) -> object:
    """The cache among the keyword arguments of a call; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def output_cache(output: Any) -> object:
    """The cache in a model's output."""
    fields = {field.name for field in dataclasses.fields(output)}
    return next((getattr(output, name) for name in CACHE_NAMES if name in fields), None)


def keys_values(cache: object) -> list[tuple[Tensor, Tensor]]:
    """The keys and values [B, kv_heads, n, head_dim] of a filled cache per layer; of an encoder-decoder's, its own.

    Raises:
        UserError: The cache holds none.
    """
    own = getattr(cache, "self_attention_cache", cache)
    if own is None or not hasattr(own, "layers"):
        raise UserError("this model gives no keys and values of a text, so there is none to put learned ones before.")
    return [(layer.keys, layer.values) for layer in own.layers]


def growing_cache(pairs: Sequence[tuple[Tensor, Tensor]] = ()) -> DynamicCache:
    """transformers' usual cache, filled with a pair of keys and values [B, kv_heads, n, head_dim] per layer."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for index, (keys, values) in enumerate(pairs):
        cache.update(keys, values, index)
    return cache


def fixed_cache(pairs: Sequence[tuple[Tensor, Tensor]]) -> Cache:
    """A cache that keeps these pairs [B, kv_heads, n, head_dim] alone: a checkpointed block shows its keys twice."""
    from transformers.cache_utils import Cache, DynamicLayer

    class PrefixLayer(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *_: object, **more: object) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                return super().update(key_states, value_states)
            assert self.keys is not None
            assert self.values is not None
            return cat([self.keys, key_states], dim=-2), cat([self.values, value_states], dim=-2)

    cache = Cache(layer_class_to_replicate=PrefixLayer)
    for index, (keys, values) in enumerate(pairs):
        cache.update(keys, values, index)
    return cache


def growing_decoder_cache(pairs: Sequence[tuple[Tensor, Tensor]] = ()) -> EncoderDecoderCache:
    """``growing_cache`` for the decoder of an encoder-decoder; it also keeps the keys and values of cross-attention.

    Pairs are [B, kv_heads, n, head_dim].
    """
    from transformers.cache_utils import EncoderDecoderCache

    return EncoderDecoderCache(growing_cache(pairs), growing_cache())


def fixed_decoder_cache(pairs: Sequence[tuple[Tensor, Tensor]]) -> EncoderDecoderCache:
    """``fixed_cache`` of pairs [B, kv_heads, n, head_dim] for such a decoder; it keeps nothing of cross-attention."""
    from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

    class EmptyCache(Cache):
        def update(self, key_states: Tensor, value_states: Tensor, *_: object, **kw: object) -> tuple[Tensor, Tensor]:
            return key_states, value_states

    cache = EncoderDecoderCache(fixed_cache(pairs), EmptyCache(layer_class_to_replicate=DynamicLayer))
    cache.is_updated = _NoUpdates()
    return cache


class _NoUpdates(dict[int, bool]):
    def __setitem__(self, layer: int, value: bool) -> None:
        pass


def paths_in_files(model: nn.Module, paths: Iterable[str]) -> dict[str, str | None]:
    """Modules whose own path in a LoRA file leads elsewhere -> the path that leads to them; None if none does.

    transformers gives the tensors of some checkpoints other names as it loads them, and peft sends a LoRA file through
    the same list. Where that list also matches a name that it has already changed (``shared_expert.`` is a part of
    ``shared_experts.``, since ``.`` matches any character), a file by the module's path is lost in silence.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    pretrained = cast("PreTrainedModel", model)
    if get_checkpoint_conversion_mapping(pretrained.config.model_type) is None:
        return {}
    renamings = [one for one in get_model_conversion_mapping(pretrained) if isinstance(one, WeightRenaming)]
    back: list[Any] = [one.reverse_transform() for one in reversed(renamings)]
    found: dict[str, str | None] = {}
    end = ".lora_A.weight"
    for path in paths:
        if rename_source_key(path + end, renamings, [])[0] == path + end:
            continue
        other = rename_source_key(path + end, back, [], reverse=True)[0]
        there = other.endswith(end) and rename_source_key(other, renamings, [])[0] == path + end
        found[path] = other.removesuffix(end) if there else None
    return found
