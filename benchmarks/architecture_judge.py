"""One configuration through Weft, judged by what transformers' untouched model says: an outcome per method.

All that is asked of Weft goes through ``load_base``, ``Adapters``, ``generate`` and the trainer's ``sequence_losses``.
"""

from __future__ import annotations

import functools
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.architecture_cell import Cell, picture
from benchmarks.architecture_configs import LENGTHS
from benchmarks.architecture_report import NOTHING
from benchmarks.architecture_truth import (
    LIMIT,
    Truth,
    first_line,
    guarded,
    load_plain,
    plain_logits,
    relative,
    rounding,
)
from tests.kit import NOT_IDENTITY, NOT_MERGEABLE, SETTINGS, UNTRAINED
from torch import Tensor, nn

from weft import load_base
from weft.api import Adapters
from weft.base.kinds import linear_shape
from weft.core.stream import Part
from weft.data import Sample
from weft.errors import UserError
from weft.generation import Request, generate
from weft.merge.model import check_as_written, merged_model
from weft.methods import METHODS
from weft.models.attached import prove_attached
from weft.objectives.passes import Work, sequence_losses

BASE = "base"
# Beside LoRA as it comes: LoRA on every linear of the blocks by name, which peft must understand as we do.
NAMED = "lora:named"
# And on experts that are held as 3-D parameters, once LoRA can have them.
EXPERTS = "lora:experts"
_MORE = [NAMED, EXPERTS] if "target_parameters" in METHODS["lora"].model_fields else [NAMED]
COLUMNS = [BASE, *sorted([*METHODS, *_MORE])]
NEW_TOKENS = 12
# Below it an adapter does nothing, and equalities prove nothing.
EFFECT = 1e-4
PEFT = {"lora", "adalora", "ia3", "ln_tuning", "prompt_tuning", "prefix_tuning", "p_tuning", "p_tuning_v2", "vera",
        "hard_prompt", "trainable_tokens"}  # fmt: skip


def make_texts(seed: int = 0) -> list[list[int]]:
    """Token ids of very different lengths; none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in LENGTHS]


class Judge:
    """Weft's side of one configuration, whose folder is there, beside the truth of that folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.truth = Truth(folder)
        self.texts = make_texts()
        self.wanted = [self.truth.logits(ids) for ids in self.texts]
        if not all(bool(torch.isfinite(w).all()) for w in self.wanted):
            raise ValueError("the untouched model gives NaN or infinity")
        # Rounding is not the same beside a neighbour, even where these texts happened to lose little.
        self.limit = LIMIT + 10 * min(max(rounding(self.truth.model, self.texts), 1e-6), LIMIT)
        self.base: Any = None

    def load(self) -> Any:
        """Weft's base, afresh."""
        self.base = load_base(str(self.folder), dtype="float32", device="cpu")
        for ids in self.texts:  # transformers' own forward leaves marks in some (frequency tables), which are no fault
            guarded(lambda: plain_logits(self.base.model, ids))  # noqa: B023
        return self.base

    def names_it(self, message: str, method: str = "") -> bool:
        """Whether a refusal says what it is about: the type, a module, or the method."""
        kind = self.name.split(":")[0]
        named = {kind, kind.replace("_", "-"), self.truth.model.config.model_type, type(self.truth.model).__name__}
        # A path, for "model" alone is a module too.
        paths = {path for path, _ in self.truth.model.named_modules() if "." in path}
        paths |= {name for name, _ in self.truth.model.named_parameters(remove_duplicate=False)}
        words = set(re.findall(r"[\w.-]+", message)) | set(re.findall(r"\w+", message))
        return bool(words & (named | paths | ({method} if method else set())))

    def refuse(self, cell: Cell, error: UserError, method: str = "") -> None:
        """A refusal, which must name what it refuses."""
        text = first_line(error).replace(str(self.folder), "FOLDER")
        if self.names_it(text, method):
            cell.refused = text
        else:
            cell.crash = f"a refusal that names neither type, module nor method: {text}"

    def judge(self, methods: Sequence[str]) -> dict[str, Cell]:
        """The cells of the base and of ``methods``."""
        cells = {BASE: Cell()}
        try:
            base = self.load()
            adapters = Adapters(base.model, base.architecture)
            cells[BASE].path = "padded" if adapters.layout.route.padded else "stream"
            adapters.close()
        except UserError as error:
            self.refuse(cells[BASE], error)
        except Exception:
            with cells[BASE].watching("load"):
                raise
        if not cells[BASE].path:
            return {**cells, **{method: cells[BASE] for method in methods}}
        self.refusing(BASE, cells[BASE], self.judge_base)
        for method in methods:
            if method == EXPERTS and not experts_of(self.base.model, self.base.architecture.blocks):
                cells[method] = Cell(NOTHING)
                continue
            cells[method] = Cell(cells[BASE].path)
            self.refusing(method, cells[method], functools.partial(self.judge_method, method))
        return cells

    def refusing(self, column: str, cell: Cell, run: Callable[[Cell], None]) -> None:
        """Run the checks of a cell; a ``UserError`` on the way is its refusal."""
        try:
            run(cell)
        except UserError as error:
            self.refuse(cell, error, "" if column == BASE else column.split(":")[0])

    @contextmanager
    def opened(self, cell: Cell) -> Iterator[Adapters]:
        """An ``Adapters`` on the base; afterwards the model must be what it was, and say what it said."""
        before = picture(self.base.model)
        adapters = Adapters(self.base.model, self.base.architecture)
        try:
            yield adapters
        finally:
            with cell.watching("close"):
                adapters.close()
                after = picture(self.base.model)
                changed = [key for key in before if before[key] != after[key]]
                if changed:
                    cell.wrong.append(f"close leaves other {', '.join(changed)}")
                with torch.no_grad():
                    own = [plain_logits(self.base.model, ids) for ids in self.texts[:4]]
                gap = max(relative(w, o) for w, o in zip(self.wanted, own, strict=False))
                cell.equal("the model's own forward after close", gap, self.limit)
            if cell.wrong or cell.crash:
                with cell.watching("reload"):
                    self.load()

    # --- the plain base -------------------------------------------------------------------------------------------

    def judge_base(self, cell: Cell) -> None:
        """Logits in a mixed batch and alone, the trainer's loss, greedy generation."""
        with self.opened(cell) as adapters:
            with cell.watching("forward"):
                cell.equal("mixed batch", worst(self.wanted, logits_of(adapters, [(None, self.texts)])), self.limit)
                alone = [logits_of(adapters, [(None, [ids])])[0] for ids in self.texts]
                cell.equal("alone", worst(self.wanted, alone), self.limit)
            with cell.watching("loss"), torch.no_grad():
                texts = self.texts[1:]
                (losses,) = sequence_losses(adapters, [Work(None, [sample_of(ids) for ids in texts])])
                wanted = torch.tensor([self.truth.loss(ids) for ids in texts], dtype=torch.float64)
                cell.equal("loss", relative(wanted, losses), self.limit)
            with cell.watching("generate"):
                self.judge_generation(adapters, cell)

    def judge_generation(self, adapters: Adapters, cell: Cell) -> None:
        """Greedy answers to prompts of all lengths in one batch: those of whole passes, or of transformers' cache."""
        prompts, wrong = self.texts[:4], []
        try:
            asked = [Request(ids, None, NEW_TOKENS) for ids in prompts]
            found = [c.ids for c in generate(adapters, asked, stop_ids=())]
        except UserError as error:
            cell.notes.append(f"generation refused: {first_line(error)}")
            return
        for ids, answer in zip(prompts, found, strict=True):
            wanted = self.truth.greedy(ids, NEW_TOKENS)
            theirs = self.truth.generated(ids, NEW_TOKENS)
            if theirs != wanted:
                cell.notes.append(f"transformers' generate: {theirs if isinstance(theirs, str) else 'other tokens'}")
            if answer in (wanted, theirs):
                continue
            place = next((i for i, (a, b) in enumerate(zip(answer, wanted, strict=False)) if a != b), 0)
            if len(answer) != NEW_TOKENS or not self.truth.tied([*ids, *wanted[:place]], answer[place]):
                wrong.append(f"{len(ids)} (at {place})")
        if wrong:
            cell.wrong.append(f"generation after {', '.join(wrong)} tokens")

    # --- one method -----------------------------------------------------------------------------------------------

    def judge_method(self, method: str, cell: Cell) -> None:
        """All of the checks that the method's adapter must pass."""
        with self.opened(cell) as adapters:
            with cell.watching("add"):
                adapter = adapters.add("it", config_of(method, adapters), tokenizer=self.base.tokenizer)
                # What ``weft train`` does before the first step; it may refuse, and must not pass what fails below.
                prove_attached(adapters, "it")
            if cell.crash:
                return
            with cell.watching("at init"):
                fresh = logits_of(adapters, [("it", self.texts)])
                if method not in NOT_IDENTITY:
                    cell.equal("not the identity at init", worst(self.wanted, fresh), self.limit)
            move(adapter)
            routed = self.judge_rows(adapters, cell)
            if method not in UNTRAINED:
                with cell.watching("backward"):
                    self.judge_gradients(adapters, cell)
            if routed is not None:
                self.judge_outside(method, adapters, routed, cell)

    def judge_rows(self, adapters: Adapters, cell: Cell) -> list[Tensor] | None:
        """The adapter's rows alone and beside the base's, and the base's beside the adapter's."""
        routed = None
        with cell.watching("mixed batch"):
            routed = [logits_of(adapters, [("it", [ids])])[0] for ids in self.texts]
            mixed = logits_of(adapters, [(None, self.texts[::-1]), ("it", self.texts)])
            count = len(self.texts)
            cell.equal("the base beside it", worst(self.wanted[::-1], mixed[:count]), self.limit)
            cell.equal("its rows in a mixed batch", worst(routed, mixed[count:]), self.limit)
            effect = min(relative(w, r) for w, r in zip(self.wanted, routed, strict=True))
            if not effect > EFFECT:
                cell.wrong.append(f"the adapter does nothing (changes {effect:.1g})")
        return routed

    def judge_gradients(self, adapters: Adapters, cell: Cell) -> None:
        """Every trained tensor gets a gradient from the trainer's own loss; the base none."""
        adapter = adapters["it"]
        (losses,) = sequence_losses(adapters, [Work("it", [sample_of(ids) for ids in self.texts[1:]])])
        losses.sum().backward()
        dead = [n for n, p in adapter.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        if dead:
            cell.wrong.append(f"no gradient at {len(dead)} trained tensors: {', '.join(places(adapter, dead)[:8])}")
        bad = [n for n, p in adapter.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        if bad:
            cell.wrong.append(f"gradients of NaN or infinity: {', '.join(places(adapter, bad)[:3])}")
        if any(p.grad is not None for p in self.base.model.parameters()):
            cell.wrong.append("the base's tensors get gradients")
        adapter.zero_grad(set_to_none=True)

    def judge_outside(self, method: str, adapters: Adapters, routed: list[Tensor], cell: Cell) -> None:
        """What others compute with the same tensors: transformers' own forward, the merged model, peft."""
        adapter = adapters["it"]
        if adapter.num_virtual_tokens:
            with cell.watching("rows before the text"), torch.no_grad():
                rows = adapter.virtual_tokens(None).detach()
                self.compare(cell, "transformers, the same rows before the text", routed,
                             lambda ids: self.truth.with_rows(rows, ids))  # fmt: skip
        if adapter.num_prefix_tokens:
            with cell.watching("keys before the text"), torch.no_grad():
                states = [(k.detach(), v.detach()) for k, v in adapter.prefix_states()]
                self.compare(cell, "transformers, the same keys in its cache", routed,
                             lambda ids: self.truth.with_prefix(states, ids))  # fmt: skip
        if method not in NOT_MERGEABLE:
            with cell.watching("merge"):
                self.judge_merged(adapters, routed, cell)
        if method.split(":")[0] in PEFT:
            with cell.watching("save"):
                self.judge_peft(adapters, routed, cell)

    def compare(self, cell: Cell, what: str, routed: list[Tensor], theirs: Any) -> None:
        """``routed`` against what ``theirs`` gives for each text; where it raises, nothing can be compared."""
        try:
            found = [theirs(ids) for ids in self.texts]
        except Exception as error:
            cell.notes.append(f"not compared: {what}: {type(error).__name__}: {first_line(error)[:120]}")
            return
        cell.equal(what, worst(routed, found), self.limit)

    def judge_merged(self, adapters: Adapters, routed: list[Tensor], cell: Cell) -> None:
        """The merged weights in a plain model."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                new = merged_model(self.base.model, adapters.architecture, adapters.merge("it"))
                new.save_pretrained(folder)
                plain = load_plain(Path(folder))
                check_as_written(plain, Path(folder))
            except UserError as error:
                cell.notes.append(f"not merged: {first_line(error)}")
                return
        # The tensors were rounded once more, and with these weights a model may lose more than the base does.
        limit = max(self.limit, LIMIT + 10 * min(rounding(plain, self.texts), 10 * LIMIT))
        cell.equal("merged", worst(routed, [plain_logits(plain, ids) for ids in self.texts]), limit)

    def judge_peft(self, adapters: Adapters, routed: list[Tensor], cell: Cell) -> None:
        """peft's model of the saved adapter on an untouched copy."""
        import peft

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapters.save("it", folder)
            try:
                theirs: Any = peft.PeftModel.from_pretrained(load_plain(self.folder), folder).eval()
            except Exception as error:
                cell.notes.append(f"not compared: peft: {type(error).__name__}: {first_line(error)[:120]}")
                return
            give_back_biases(theirs)
            self.compare(cell, "peft", routed, lambda ids: peft_logits(theirs, ids))


def config_of(method: str, adapters: Adapters) -> Any:
    """The method's defaults, small where the contract tests make them small."""
    if method not in (NAMED, EXPERTS):
        return METHODS[method](**SETTINGS.get(method, {}))
    model, shape = adapters.model, adapters.architecture
    # A rank of 2 fits wherever more than one number goes in and out.
    paths = [path for path in shape.linears if min(linear_shape(model.get_submodule(path))) > 1]
    settings: dict[str, Any] = {"r": 2, "target_modules": paths}
    if method == EXPERTS:
        settings |= {"target_modules": paths[:1], "target_parameters": experts_of(model, shape.blocks)}
    return METHODS["lora"](**settings)


def experts_of(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """The 3-D parameters of a model's blocks that are experts' matrices."""
    inside = [(name, p) for name, p in model.named_parameters() if name.startswith(tuple(f"{b}." for b in blocks))]
    return [name for name, p in inside if p.ndim == 3 and "expert" in name]


@torch.no_grad()
def logits_of(adapters: Adapters, parts: Sequence[tuple[str | None, list[list[int]]]]) -> list[Tensor]:
    """Logits of every text's own tokens, in one pass."""
    stream = adapters.stream([Part(name, texts) for name, texts in parts])
    hidden = adapters.forward(stream)
    names = [name for name, texts in parts for _ in texts]
    out = []
    for name, rows in zip(names, stream.rows, strict=True):
        own = hidden[torch.tensor(list(rows))]
        out.append(adapters.logits(own, [(name, len(own))]))
    return out


def give_back_biases(model: nn.Module) -> None:
    """Add the bias of a tied head, which peft's layer for rows of tokens leaves out: it computes ``F.linear(x, W)``."""
    for module in model.modules():
        base = module.get_base_layer() if type(module).__name__ == "TrainableTokensLayer" else None
        if isinstance(base, nn.Linear) and base.bias is not None:
            module.register_forward_hook(lambda _, given, out, bias=base.bias: out + bias)


@torch.no_grad()
def peft_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """peft's logits of one text's own tokens."""
    tokens = torch.tensor([list(ids)])
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
    return logits[len(logits) - len(ids) :]


def worst(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest relative difference over all texts."""
    return max(relative(w, f) for w, f in zip(wanted, found, strict=True))


def move(adapter: nn.Module, scale: float = 0.1) -> None:
    """Every trained tensor away from where it began."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def places(adapter: Any, parameters: Sequence[str]) -> list[str]:
    """Where parameters of an adapter sit: ends of the file's names, the same of all blocks once."""
    tensors: Mapping[str, Tensor] = adapter.tensors()
    own = dict(adapter.named_parameters())
    keys = {id(t): key for key, t in tensors.items()}
    found = [keys.get(id(own[name]), name) for name in parameters]
    parts = [[part for part in key.split(".") if not part.isdigit() and part != "weight"] for key in found]
    return list(dict.fromkeys(".".join(words[-3:]) for words in parts))


def sample_of(ids: list[int]) -> Sample:
    """A text of which every token but the first is learned."""
    return Sample(ids, [0.0] + [1.0] * (len(ids) - 1), "text")
