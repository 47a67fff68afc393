"""Trials of an untouched base: the results of its own forward for a few short sequences, and its steps on the way."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn

from weft.base.body import accepted
from weft.base.embeddings import config_of, input_embeddings, output_head
from weft.base.kinds import is_linear, linear_shape
from weft.base.mixin import Mixin, mixed
from weft.core.architecture import NEVER_CALLED, Architecture
from weft.errors import UserError
from weft.layouts.encoder_decoder import start_token

_SEEN = "_weft_seen"


def sequences_for(model: nn.Module, shape: Architecture, learned: int = 0) -> list[list[int]]:
    """Token ids of a few sequences of different lengths; one is longer than every small window of the model.

    ``learned`` tokens of an adapter stand before each, and count against the model's limit.
    """
    text = config_of(model).get_text_config()
    windows = [v for v in vars(text).values() if type(v) is int and 16 < v <= 128] if _small(model) else []
    longest = max([23, *(window + 5 for window in windows)])
    # All but the shortest sequence exceed a window of a few tokens. MPT has another name for its limit.
    limit = shape.max_length or getattr(text, "max_seq_len", None) or longest + learned
    table = input_embeddings(model)
    vocabulary = min(table.weight.shape[0], getattr(text, "vocab_size", None) or table.weight.shape[0])
    barred = {getattr(text, "pad_token_id", None)}
    ids = [token for token in range(vocabulary) if token not in barred]
    generator = torch.Generator().manual_seed(0)
    lengths = [max(min(n, limit - learned), 1) for n in (5, longest, 11)]
    return [[ids[i] for i in torch.randint(len(ids), (n,), generator=generator).tolist()] for n in lengths]


def _small(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) < 50_000_000


@torch.no_grad()
def own_output(model: nn.Module, shape: Architecture, batch: Sequence[Sequence[int]]) -> Tensor:
    """The model's own logits [B, T, vocabulary] for sequences of one length; of an encoder its hidden states."""
    run = model.base_model if shape.bidirectional else model
    assert isinstance(run, nn.Module)
    ids = torch.tensor(batch, device=input_embeddings(model).weight.device)
    out = run(input_ids=ids, **accepted(run, use_cache=False, return_dict=True))
    return out.last_hidden_state if shape.bidirectional else out.logits


@torch.no_grad()
def own_pair(model: nn.Module, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Tensor:
    """An encoder-decoder's own logits [B, T, vocabulary] of targets of one length, for sources of one length."""
    begin = start_token(model)
    ids = torch.tensor(sources, device=input_embeddings(model).weight.device)
    before = torch.tensor([[begin, *target[:-1]] for target in targets], device=ids.device)
    return model(input_ids=ids, decoder_input_ids=before, use_cache=False).logits


@dataclass
class _Notes:
    """Notes on one module: its calls and their rows, a strange result, and whether its weight was read."""

    calls: int = 0
    rows: set[int] = field(default_factory=set)
    strange: str = ""
    _: KW_ONLY
    read: bool = False
    inside: bool = False


@dataclass(frozen=True)
class Trace:
    """The steps of a run of the model: the modules' paths in the order of their calls, and notes on linears."""

    order: list[str]
    seen: dict[str, _Notes]

    @property
    def body(self) -> str:
        """The first module that the model's forward calls."""
        return next(path for path in self.order if path)


class _Watch(Mixin):
    def forward(self, *args: object, **kwargs: object) -> object:
        seen: _Notes = self.__dict__[_SEEN]
        seen.calls, seen.inside = seen.calls + 1, True
        try:
            out: object = super().forward(*args, **kwargs)
        finally:
            seen.inside = False
        if not isinstance(out, Tensor):
            seen.strange = f"gives a {type(out).__name__}, no tensor"
        elif args and isinstance(args[0], Tensor) and is_linear(self):
            width_in, width_out = linear_shape(self)
            if args[0].shape[-1] != width_in or out.shape != (*args[0].shape[:-1], width_out):
                seen.strange = f"turns {tuple(args[0].shape)} into {tuple(out.shape)}, which is no product of rows"
            seen.rows.add(args[0].numel() // width_in)
        return out

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Python finds nn.Module's parameters only by this method.
        if name == "weight" and not self.__dict__[_SEEN].inside:
            self.__dict__[_SEEN].read = True
        return super().__getattr__(name)


@contextlib.contextmanager
def calls(model: nn.Module) -> Iterator[list[str]]:
    """Inside, the model notes the paths of its modules in the order of their calls."""
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
        for path, module in model.named_modules()
    ]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watched(model: nn.Module, paths: Sequence[str]) -> Iterator[Trace]:
    """Inside, the model notes the order of all calls, and the use of the modules at ``paths``."""
    seen: dict[str, _Notes] = {}
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    for path in paths:
        module = model.get_submodule(path)
        if _SEEN in module.__dict__:  # one module under two paths
            seen[path] = module.__dict__[_SEEN]
            continue
        seen[path] = module.__dict__[_SEEN] = _Notes()
        swapped.append((module, type(module)))
        module.__class__ = mixed("Watched", _Watch, type(module))
    try:
        with calls(model) as order:
            yield Trace(order, seen)
    finally:
        for module, own in swapped:
            module.__class__ = own
            del module.__dict__[_SEEN]


def unreachable(trace: Trace) -> dict[str, str]:
    """Modules on which an adapter would have no effect, or another than it says -> the reason."""
    called = {path for path, seen in trace.seen.items() if seen.calls}
    found: dict[str, str] = {}
    for path, seen in trace.seen.items():
        if seen.strange:
            found[path] = seen.strange
        elif seen.calls == 0 and seen.read:
            found[path] = "is never called: the model reads its weight and computes with it elsewhere"
        elif seen.calls == 0 and not has_called_sibling(path, called):
            found[path] = NEVER_CALLED
    return found


def has_called_sibling(path: str, called: set[str]) -> bool:
    """Whether another module of the same list was called: it is an expert that got no token."""
    for found in re.finditer(r"expert[^.]*(\.)\d+(?=\.|$)", path):
        before, after = path[: found.end(1)], path[found.end() :]
        if any(other.startswith(before) and other.endswith(after) and other != path for other in called):
            return True
    return False


def _make(module: nn.Module) -> tuple[object, ...]:
    """The parts of a module, without its notes while it runs (RWKV notes that it has scaled its weights)."""
    return type(module), dict(module._modules)


@contextlib.contextmanager
def unchanging(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs; afterwards its parts must be the same.

    Raises:
        UserError: They are not, so its answers depend on earlier texts (BigBird gives up its sparse attention at the
            first short text).
    """
    before = {path: (module, _make(module)) for path, module in model.named_modules()}
    words = [(m, {k: v for k, v in vars(m).items() if isinstance(v, str)}) for m in model.modules()]
    try:
        yield
    finally:
        changed = [path for path, (module, made) in before.items() if _make(module) != made]
        for path in changed:
            module, (kind, children) = before[path]
            module.__class__ = kind
            module._modules.clear()
            module._modules.update(children)
        for module, said in words if changed else ():
            module.__dict__.update(said)
    if changed:
        config = config_of(model)
        raise UserError(
            f"this {config.model_type} model changes itself as it runs: after a few short texts, '{changed[0]}' is "
            "made of other modules or settings, so what it answers depends on the texts before. Take another base."
        )


# The memory that weights in float32 may take beside the model's own.
_WIDE = 1_500_000_000
_NARROW = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[bool]:
    """Inside, a model in bfloat16 or float16 has the same weights in float32; yields whether that is so.

    Quantised models, whose kernels want their own dtype, and the rest of very large ones do not change.
    """
    held = [*model.parameters(), *model.buffers()]
    narrow = [tensor for tensor in held if tensor.dtype in _NARROW]
    plain = all(p.dtype in (*_NARROW, torch.float32, torch.float64) for p in model.parameters())
    if not narrow or not plain or sum(tensor.numel() for tensor in narrow) > _WIDE:
        yield False
        return
    kept = [(tensor, tensor.data) for tensor in narrow]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        yield True
    finally:
        for tensor, data in kept:
            tensor.data = data


# The number of rows that remain of a large vocabulary.
_WORDS = 1024


@contextlib.contextmanager
def fewer_words(model: nn.Module) -> Iterator[bool]:
    """Inside, a large model has only the first rows of its vocabulary; yields whether rows were cut.

    In a model of 8 billion parameters the vocabulary has twice as many as the two blocks of the trial, and all its rows
    are treated alike.
    """
    table, head = input_embeddings(model), output_head(model)
    if not isinstance(table, nn.Embedding) or head is None or type(head) is not nn.Linear:
        yield False
        return
    rows = len(table.weight)
    alike = {id(p) for p in model.parameters() if p.ndim and p.shape[0] == rows}
    own = {id(p): p for p in (table.weight, *head.parameters())}
    if rows <= _WORDS or _small(model) or alike != own.keys():
        yield False
        return
    words = (table.num_embeddings, table.padding_idx, head.out_features)
    kept = [(p, p.data) for p in own.values()]
    try:
        for parameter, data in kept:
            parameter.data = data[:_WORDS]
        # torch refuses a padding token outside the table. It only stops gradients, of which there are none.
        table.num_embeddings, table.padding_idx, head.out_features = _WORDS, None, _WORDS
        yield True
    finally:
        for parameter, data in kept:
            parameter.data = data
        table.num_embeddings, table.padding_idx, head.out_features = words


@contextlib.contextmanager
def shallow(model: nn.Module, shape: Architecture) -> Iterator[int]:
    """Inside, a large model has only its first blocks, with one of every kind among them; yields their number.

    Blocks of one kind run the same code, so a proof of one holds for all.
    """
    depth = _depth(model, shape)
    parent, _, name = shape.blocks[0].rpartition(".")[0].rpartition(".")
    text = config_of(model).get_text_config()
    if depth == len(shape.blocks) or not hasattr(text, "num_hidden_layers"):
        yield len(shape.blocks)
        return
    owner = model.get_submodule(parent)
    blocks, layers = owner._modules[name], text.num_hidden_layers
    assert isinstance(blocks, nn.ModuleList)
    owner._modules[name] = nn.ModuleList(list(blocks)[:depth])
    text.num_hidden_layers = depth
    try:
        yield depth
    finally:
        owner._modules[name] = blocks
        text.num_hidden_layers = layers


def _depth(model: nn.Module, shape: Architecture) -> int:
    if _small(model) or shape.memory_linears:
        return len(shape.blocks)
    return max(2, max(first_alike(model, shape).values()) + 1)


def first_alike(model: nn.Module, shape: Architecture) -> dict[str, int]:
    """The path of each block -> the number of the first block of its kind."""
    text = config_of(model).get_text_config()
    types = getattr(text, "layer_types", None) or itertools.repeat(None)
    first: dict[object, int] = {}
    return {
        path: first.setdefault((_kind(model.get_submodule(path)), kind), index)
        for index, (path, kind) in enumerate(zip(shape.blocks, types, strict=False))
    }


def _kind(block: nn.Module) -> tuple[object, ...]:
    numbers = ("layer_idx", "layer_id", "layer_number")
    return tuple(
        (path, type(module), tuple(p.shape for p in module.parameters(recurse=False)),
         tuple((n, v) for n, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and n not in numbers))
        for path, module in block.named_modules()
    )  # fmt: skip
