"""The facts about a model's shape that Weft needs, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from torch import nn

from weft.core.route import Router
from weft.errors import UserError, nearest
from weft.ops.loss import HeadForm
from weft.patterns import last_parts, named, pattern

# (model, router) -> the function that undoes the installation.
Installer = Callable[[nn.Module, Router], Callable[[], None]]


# The reason why no adapter can sit on a module that plays no part in the model's answer to a text.
NEVER_CALLED = "is never called"


@dataclass(frozen=True)
class Architecture:
    """The places of the parts of one loaded model, as the paths of ``model.named_modules()``.

    ``attention_output`` and ``mlp_output`` are the last linear of each sub-layer. A bottleneck adapter sits on them,
    because the sub-layer adds their output to the residual stream.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    _: KW_ONLY
    num_heads: int
    num_kv_heads: int
    head_dim: int
    blocks: tuple[str, ...]
    linears: tuple[str, ...]
    norms: tuple[str, ...]
    attention_output: tuple[str, ...]
    mlp_output: tuple[str, ...]
    # Element-wise functions that are modules: their last few elements take another code path than the rest.
    activations: tuple[str, ...] = ()
    # ``experts`` hold the matrices of all experts as parameters and are called with the text's tokens; ``routers``
    # choose among experts by a matrix of their own. Neither is a linear, so no method for linears reaches them.
    experts: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    # Linears with one output (the gate of a shared expert): a low-rank update of them saves nothing.
    single_outputs: frozenset[str] = frozenset()
    # The last parts of the paths of all modules that are not in ``linears``; empty: they are not known.
    other_names: frozenset[str] = frozenset()
    max_length: int | None = None
    # The table of token embeddings and the linear that gives the logits (which may share one tensor).
    embeddings: str = ""
    # Width of that table's rows, where it is not the blocks'; 0: the same.
    embedding_size: int = 0
    head: str = ""
    # Every token sees the whole sequence (an encoder), not only what stands before it.
    bidirectional: bool = False
    # Norms stand after the sum of a sub-layer and what it was given, not before the sub-layer.
    norms_sums: bool = False
    # Of a classification head on this model (``weft.heads``), and where the base's own pooler is.
    head_kind: str = "score"
    pooler: str | None = None
    # Modules that are not called with their rows first -> the argument that holds the rows (tables of positions that
    # are called with a mask first).
    rows_named: Mapping[str, str] = field(default_factory=dict)
    # What PEFT calls the task of a job without a head of its own.
    peft_task: str = "CAUSAL_LM"
    # Positions begin here (behind the pad token's id, for one).
    first_position: int = 0
    # The linears of a decoder that read the encoder's states; empty where there is no encoder.
    memory_linears: tuple[str, ...] = ()
    # The number of segments that the embeddings tell apart (encoders of pairs: 2); 0: the model has no such embedding.
    token_types: int = 0
    # The module that the model's forward calls for its hidden states; "": ``model.base_model``.
    body: str = ""
    # The way from the output layer to logits; None: the model's own code (a dense layer and a norm before it, say).
    head_form: HeadForm | None = field(default_factory=HeadForm)
    # The body looks its embeddings up by itself, because it also needs the ids (inputs per layer).
    by_ids: bool = False
    # Linear modules that no adapter can sit on -> why (their weight is read, they are never called).
    unreachable: Mapping[str, str] = field(default_factory=dict)
    # Modules -> the path by which peft finds them in a LoRA file (``paths_in_files``); None: it finds them by none.
    file_paths: Mapping[str, str | None] = field(default_factory=dict)
    # Makes the model attend along the packed stream. None: the model works on padded batches only, and
    # ``padded_because`` says why.
    install_attention: Installer | None = None
    padded_because: str = ""
    # Makes modules of positions answer sequence by sequence, where their tables depend on the whole pass.
    install_tables: Installer | None = None
    # (model, length, longer) -> whether those tables change while a text grows: keys in a cache keep the old ones.
    tables_move: Callable[[nn.Module, int, int], bool] | None = None

    @property
    def task(self) -> Literal["causal_lm", "seq2seq"]:
        """The task that the base was made for: ``seq2seq`` for an encoder-decoder, else ``causal_lm``."""
        return "seq2seq" if self.memory_linears else "causal_lm"

    @property
    def writes(self) -> bool:
        """Whether the base writes text: an encoder does not."""
        return not self.bidirectional

    @property
    def stacks(self) -> int:
        """How many stacks of blocks a text goes through: two in an encoder-decoder."""
        return 2 if self.memory_linears else 1

    def check_reachable(self, path: str) -> None:
        """Refuse a module on which an adapter would do nothing.

        Raises:
            UserError: the trial of the base saw that the model does not compute with the module as its weight says.
        """
        if path in self.unreachable:
            raise UserError(f"module '{path}' of this {self.model_type} model {self.unreachable[path]}; no adapter can "
                            "sit on it.")  # fmt: skip

    def match(
        self, targets: str | Iterable[str], layers: Iterable[int] | None = None, more: Sequence[str] = ()
    ) -> list[str]:
        """Linear modules that ``target_modules`` names, by PEFT's rules.

        ``"all-linear"`` means every linear of the blocks; another string is a regular expression over the whole path;
        a list holds last parts of paths. ``layers`` keeps those blocks only. ``more`` are modules outside the blocks
        that can be named too.

        Raises:
            UserError: An entry of the list, or the whole of it, matches no module (a typo would silently make a smaller
                adapter); the message lists the modules that can match. Or there is no such layer.
        """
        wanted: str | list[str] = targets if isinstance(targets, str) else list(targets)
        if not isinstance(wanted, str):
            for name in wanted:
                if not any(named(path, [name]) for path in (*self.linears, *more)):
                    for path in self.unreachable:
                        if named(path, [name]):
                            self.check_reachable(path)
                    raise UserError(self._no_match(name, more))
        last = max(int(block.rsplit(".", 1)[-1]) for block in self.blocks)
        absent = [i for i in layers or () if not 0 <= i <= last]
        if absent:
            raise UserError(f"layers_to_transform: there is no layer {absent[0]}; this model has 0 to {last}.")
        could = self.linears if wanted == "all-linear" else (*self.linears, *more)
        found = [path for path in could if _matches(path, wanted)]
        if layers is not None:
            # An encoder-decoder has a layer of each number in both stacks.
            keep = tuple(f"{block}." for block in self.blocks if int(block.rsplit(".", 1)[-1]) in set(layers))
            found = [path for path in found if path.startswith(keep)]
        if not found:
            raise UserError(self._no_match(wanted, more))
        return found

    def naming(self, paths: Sequence[str]) -> list[str]:
        """The ``target_modules`` by which PEFT finds just these linears: last parts of their paths, or whole paths."""
        names = last_parts(paths)
        rest = last_parts({*self.linears, self.head} - set(paths)) | self.other_names
        return sorted(names) if self.other_names and not names & rest else list(paths)

    def _no_match(self, wanted: str | list[str], more: Sequence[str]) -> str:
        names = sorted(last_parts((*self.linears, *more)))
        hint = nearest(wanted, names) if isinstance(wanted, str) else ""
        return (
            f"target_modules {wanted!r} matches no linear module of this {self.model_type} model.{hint} "
            f"What can match: {', '.join(names)} (or 'all-linear')."
        )


def body_of(model: nn.Module, shape: Architecture) -> nn.Module:
    """The module that turns embeddings into last hidden states."""
    body = model.get_submodule(shape.body) if shape.body else model.base_model
    assert isinstance(body, nn.Module)
    return body


def _matches(path: str, wanted: str | list[str]) -> bool:
    if isinstance(wanted, str):
        return wanted == "all-linear" or pattern(wanted, "target_modules").full(path) is not None
    return named(path, wanted)
