"""The two sides of `weft verify` that are models on this machine: a plain model, or a base with an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from weft.base.embeddings import config_of, input_embeddings
from weft.base.kinds import is_linear
from weft.data import Message, unlabelled_sample
from weft.data.rendering.served import ids_elsewhere
from weft.errors import UserError, reason_of
from weft.export import gguf_file
from weft.export.folder import open_trained, recast
from weft.export.gguf_file import Q8_0_BLOCK
from weft.export.number_format import NumberFormat, formats_in, words_of
from weft.export.proof import plain_logits, routed_logits
from weft.export.sources import Sources, adapter_folder
from weft.export.targets import check_target, is_adapted, is_gguf
from weft.export.weights import Weights
from weft.merge.model import merged_model
from weft.merge.weights import check_mergeable
from weft.methods.dense import dequantize_linears
from weft.models import gate
from weft.models.complete import named
from weft.models.load import load_plain, load_tokenizer
from weft.models.quantize import Kind
from weft.models.token_rows import token_rows
from weft.paths import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weft.generation.target import Target


class ModelHere(ABC):
    """A model on this machine. It computes in 32 bits with the weights that it keeps, whatever their format.

    Attributes:
        kind: what it is, in words.
        format: how it keeps its weights, in words.
        dtype: that of its embeddings, in which it runs elsewhere.
        notes: what the user should know of it.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: str,
        dtype: torch.dtype,
        notes: Sequence[str],
    ) -> None:
        self.name, self.kind, self.tokenizer = name, kind, tokenizer
        self.format, self.dtype, self.notes = format, dtype, tuple(notes)

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The transformers model, with sites where adapters are."""

    @property
    @abstractmethod
    def writes(self) -> bool:
        """Whether it answers with tokens, and not with a class."""

    @property
    def continues(self) -> bool:
        """Whether its answer goes on behind the prompt."""
        return self.writes and not config_of(self.model).is_encoder_decoder

    @property
    def max_length(self) -> int | None:
        """The number of its positions; None: any."""
        found = getattr(config_of(self.model).get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    @property
    def token_rows(self) -> int:
        """The number of tokens that have a row in the embeddings."""
        return token_rows(self.model)

    @abstractmethod
    def prompt(self, messages: Sequence[Message]) -> list[int] | None:
        """The ids [prompt length] of messages that are to be answered; None: it has no chat template."""

    def text(self, text: str) -> list[int]:
        """The ids [text length] of a text that is to be answered or classified."""
        return self.prompt([Message("user", text)]) or self.plain(text)

    def plain(self, text: str) -> list[int]:
        """The ids [text length] of a text as the tokenizer gives them."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def vocabulary(self) -> Mapping[str, int]:
        """Its tokens and their ids."""
        return self.tokenizer.get_vocab()

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [positions, tokens or classes] in 32 bits, on the CPU."""

    @abstractmethod
    def weights(self, label: str) -> Weights | None:
        """The weights of a plain model that answers as this one, under a label; None: there is none."""

    @abstractmethod
    def computing_in(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Inside, it computes in this dtype."""

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of the model."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The next ``count`` likeliest tokens after a prompt, or those up to the last position."""
        text = list(ids)
        while len(text) < min(len(ids) + count, self.max_length or len(ids) + count):
            text.append(int(self.logits(text)[-1].argmax()))
        return text[len(ids) :]


class PlainModel(ModelHere):
    """A model by transformers alone: a folder with a base, a merged model, a quantised one; or a GGUF file."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        formats: Mapping[str, NumberFormat],
        format: str,
        notes: Sequence[str] = (),
    ) -> None:
        """``formats``: of the tensors in its state dict, and ``format``: the same in words, before it was widened."""
        self._model, self._formats = model, formats
        self._classes = "Classification" in type(model).__name__
        kind = f"{config_of(model).model_type} model ({type(model).__name__})"
        dtype = input_embeddings(model).weight.dtype
        super().__init__(name, kind, tokenizer, format=format, dtype=dtype, notes=notes)
        dequantize_linears(model, torch.float32)
        nn.Module.to(model, torch.float32)

    @classmethod
    def load(cls, name: str, *, device: str = "auto", quantization: Kind | None = None) -> PlainModel:
        """The model of a folder, an embedded one, or a hub's.

        Raises:
            UserError: It cannot be loaded as a whole.
        """
        model, strange = load_plain(name, device=device, quantization=quantization)
        notes = [f"{name} holds {named(strange)} that its model has no place for"] if strange else []
        return cls(name, model, load_tokenizer(name), formats=formats_in(model), format=words_of(model), notes=notes)

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def writes(self) -> bool:
        return not self._classes

    def prompt(self, messages: Sequence[Message]) -> list[int] | None:
        """The ids that the folder's own template gives.

        Raises:
            UserError: The template refuses the messages.
        """
        if self._classes or not self.tokenizer.chat_template:
            return None
        try:
            return ids_elsewhere(self.tokenizer, None, messages)
        except Exception as error:  # a template is a program: one may refuse a system message
            raise UserError(f"the chat template of {self.name} refuses these messages: {error}") from error

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        return plain_logits(self._model, ids, next(self._model.parameters()).device)

    def weights(self, label: str) -> Weights:
        state = self._model.state_dict()
        return _weights(
            label, self._model, state, {key: self._formats.get(key, NumberFormat(t.dtype)) for key, t in state.items()}
        )

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        nn.Module.to(self._model, dtype)
        try:
            yield
        finally:
            nn.Module.to(self._model, torch.float32)

    @contextmanager
    def moved(self, errors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, errors are added to the tensors of these names, matrices as [out, in]."""
        own = {key: p for key, p in self._model.named_parameters() if key in errors}
        kept = {key: p.detach().clone() for key, p in own.items()}
        try:
            with torch.no_grad():
                for key, parameter in own.items():
                    error = errors[key].to(parameter)
                    parameter.add_(error.t() if _is_turned(self._model, key) else error)
            yield
        finally:
            with torch.no_grad():
                for key, parameter in own.items():
                    parameter.copy_(kept[key])


class AdaptedBase(ModelHere):
    """A base with an adapter, as in training. All its numbers are exact: the adapter learned beside just these."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        model: str | None = None,
        device: str = "auto",
        quantization: Kind | None = None,
    ) -> None:
        """Open the adapter's folder.

        Raises:
            UserError: It cannot be loaded, or its base is another one now and no ``model`` is named.
        """
        opened, notes = open_trained(folder, model, device, quantization)
        self._opened: Target = opened
        self._adapter = opened.names[0]
        adapter = opened.adapters[self._adapter]
        method = "+".join(part.method for part in adapter.config.methods())
        super().__init__(
            name,
            f"{method} adapter on {opened.base.name}",
            opened.base.tokenizer,
            format=words_of(opened.adapters.model),
            dtype=opened.adapters.dtype,
            notes=notes,
        )
        self._sources = Sources((folder,))
        dequantize_linears(opened.adapters.model, torch.float32)
        recast(opened, self._sources, torch.float32)

    @property
    def model(self) -> nn.Module:
        return self._opened.adapters.model

    @property
    def writes(self) -> bool:
        return self._opened.adapters.head(self._adapter).writes

    @property
    def max_length(self) -> int | None:
        limit = self._opened.adapters.architecture.max_length
        return None if limit is None else limit - self._opened.adapters[self._adapter].num_learned_tokens

    def prompt(self, messages: Sequence[Message]) -> list[int] | None:
        if not self.writes:
            return None
        return list(self._opened.renderer.prompt(messages, task=self._opened.adapters.architecture.task).ids)

    def plain(self, text: str) -> list[int]:
        if self.writes:
            return super().plain(text)
        encoder = not self._opened.adapters.architecture.writes
        return list(unlabelled_sample(self._opened.renderer, [text], "a text", encoder=encoder).input_ids)

    def logits(self, ids: Sequence[int]) -> Tensor:
        return routed_logits(self._opened.adapters, self._adapter, [list(ids)])[0]

    def weights(self, label: str) -> Weights | None:
        adapters, shape = self._opened.adapters, self._opened.adapters.architecture
        adapter = adapters[self._adapter]
        try:
            check_mergeable(adapter)
            merged = merged_model(adapters.model, shape, adapters.merge(self._adapter), adapter.head)
        except UserError:
            return None
        state = merged.state_dict()
        base = None
        if not adapter.inserted_blocks():  # they move the numbers of the blocks
            base = _weights(label, adapters.model, adapters.model.state_dict(), {}).tensors
        return _weights(label, merged, state, dict.fromkeys(state, NumberFormat(torch.float32)), base=base)

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        recast(self._opened, self._sources, dtype)
        try:
            yield
        finally:
            recast(self._opened, self._sources, torch.float32)

    def close(self) -> None:
        self._opened.close()


def open_here(
    target: str, *, model: str | None = None, device: str = "auto", quantization: Kind | None = None
) -> ModelHere:
    """Open a run with one adapter, an adapter's folder, or a model (a folder, an embedded one, a hub's id, a file).

    Args:
        model: the base of an adapter, instead of the one that it names.
        quantization: how a plain model is loaded, or the base of an adapter whose folder does not say.

    Raises:
        UserError: It cannot be opened.
    """
    check_target(target)
    folder = local_path(target)
    if is_gguf(target):
        return load_gguf(folder)
    if is_adapted(folder):
        return AdaptedBase(target, adapter_folder(folder), model=model, device=device, quantization=quantization)
    return PlainModel.load(target, device=device, quantization=quantization)


class GgufModel(PlainModel):
    """A GGUF file, as transformers reads it."""

    def vocabulary(self) -> Mapping[str, int]:
        """Those of the file that are used: transformers adds some as it reads, and rows without a token have a name."""
        return gguf_file.vocabulary(local_path(self.name))


def load_gguf(path: Path) -> GgufModel:
    """The model of a GGUF file, as transformers reads it.

    Raises:
        UserError: It is damaged, its architecture is unknown, or it keeps matrices in a format that is not judged.
    """
    formats = gguf_file.matrix_formats(path)
    try:
        model, tokenizer = gate.load_gguf(path)
    except Exception as error:  # transformers knows some architectures, and raises anything for others
        raise UserError(f"{path} is not read by transformers: {reason_of(error)}") from error
    own = {name: _gguf_format(tensor, formats) for name, tensor in model.state_dict().items()}
    return GgufModel(str(path), model, tokenizer, formats=own, format=f"GGUF in {' and '.join(formats)}")


def _gguf_format(tensor: Tensor, formats: Sequence[str]) -> NumberFormat:
    """The format of a tensor, of any shape, in a file with matrices in these formats: the coarsest that can hold it."""
    if tensor.dim() < 2:
        return NumberFormat(torch.float32)
    fitting = [one for one in formats if one != "q8_0" or tensor.shape[-1] % Q8_0_BLOCK == 0]
    return NumberFormat(*_GGUF[fitting[-1] if fitting else "f32"])


# The matrices of a file -> how transformers would keep them, and the quantisation.
_GGUF: Mapping[str, tuple[torch.dtype, str | None]] = {
    "f32": (torch.float32, None),
    "f16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "q8_0": (torch.float32, "q8_0"),
}


def _weights(
    label: str,
    model: nn.Module,
    state: Mapping[str, Tensor],
    formats: Mapping[str, NumberFormat],
    *,
    base: Mapping[str, Tensor] | None = None,
) -> Weights:
    """The tensors of a state dict, matrices as [out, in]."""
    owners: dict[int, list[str]] = {}
    tensors = {}
    for key, tensor in state.items():
        owners.setdefault(tensor.data_ptr(), []).append(key)
        turned = _is_turned(model, key)
        tensors[key] = (tensor.detach().t() if turned else tensor.detach()).cpu()
    tied = frozenset(key for keys in owners.values() if len(keys) > 1 for key in keys)
    return Weights(tensors, formats, label=label, base=base, tied=tied)


def _is_turned(model: nn.Module, key: str) -> bool:
    """Whether a tensor is a matrix [in, out], as transformers' Conv1D keeps it."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    return name == "weight" and is_linear(module) and not isinstance(module, nn.Linear)
