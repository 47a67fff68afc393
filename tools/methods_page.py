"""Write docs/methods.md from the methods' own docstrings and the measured table.

python benchmarks/methods.py --output benchmarks/results/methods.json
python benchmarks/methods.py --speed --output benchmarks/results/methods_speed.json
python benchmarks/methods_on_alpaca.py --output benchmarks/results/methods_alpaca.json
python tools/methods_page.py > docs/methods.md
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from weft.assets import EMBEDDED_MODELS
from weft.methods import METHODS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_INTRO = """\
# The methods

<!-- Written by `python tools/methods_page.py`; a test compares. Do not edit. -->

Every method with its default settings and its default learning rate, on the two embedded bases (a million
parameters, width 128): {steps} steps of {batch_size} instructions, all methods at once in one pass per base, one
seed. Exact match is that of greedy answers to 200 held-out questions; *forgets* is how much the loss per token rises
on held-out text of the kind the base was pre-trained on. *Memory* is what training adds to the base: the numbers,
their gradients and two moments, and the activations of one step. *Speed* is tokens per CPU second beside LoRA's, each
alone, by turns. Made by `benchmarks/methods.py` on {date}.

These are small models and one kind of task: the table says that the defaults work and what each method costs, not which
is best for yours. `weft train` with your data and `method: [lora, bitfit, …]` answers that, in one pass.

"""


_ALPACA = """\
## On real instructions

stories260K (260,032 parameters, width 64, pre-trained on TinyStories) after {steps} steps of {batch_size} records of
Alpaca, all methods at once with their defaults. Far too small to answer anything, so the figures are losses per token:
on 100 held-out records (learned tokens only), and on C4, which is neither's kind of text and gains too, for the base
knew children's stories only. Made by `benchmarks/methods_on_alpaca.py` on {date}.

| method | parameters | learning rate | held-out Alpaca | C4 |
|---|---|---|---|---|"""

_EXPERTS = """\
## Mixture of experts

Most mixtures of experts hold the matrices of all experts of a layer in one parameter, such as
`mlp.experts.gate_up_proj` [experts, out, in]. That is no linear module, so nothing that works on linear modules (`lora`
with DoRA and PiSSA, `adalora`, `ia3`, `vera`) reaches it: `target_modules: all-linear` adapts the attention, dense and
shared MLPs, and routers that are linear modules. `weft preview` and `weft train` say before training which parameters
are left out, their share of the base, and the key that includes them (`not_reached` in `--json`).

That key is `lora`'s `target_parameters`, with PEFT's meaning: names of parameters, whole or their last parts.

    method: lora
    target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]
    target_modules: []                     # these alone; left out: beside all linear modules
    rank_pattern: {experts.down_proj: 4}   # patterns end in the parameter's name

- Every expert gets its own pair A, B of rank `r`; the file has PEFT's tensors, and peft 0.21 loads it. Routers that
  hold a matrix themselves (`mlp.gate.weight`, `mlp.router.weight`) and biases [experts, out] can be named as well.
- Not with them: `lora_dropout`, `use_dora`, `init_lora_weights: pissa` and `loftq`, for only the weights are seen
  there, not what goes in. `weft merge` writes them into the base; `weft combine` refuses them.
- In a batch, experts are computed once per adapter that changes them, and once for all others. The changed matrices are
  kept for the backward pass (with `gradient_checkpointing` one layer's at a time), as in peft.
- Refused: experts that are called with other rows than the text's tokens (Llama 4, JetMoE, DBRX).
- `quantization` makes linear modules small and leaves experts in the base's `dtype`, as in transformers; `weft train`
  says how much of the base that is. Adapters on experts work there like everywhere.
- A linear module with one output (the gate of a shared expert) is left out of `all-linear` by `lora` and `adalora`: an
  update there has no rank to save. Name it, with a `rank_pattern` of 1, to train it.

**What peft makes of it.** On about thirty of these types peft takes `all-linear`, and every name that ends in `gate`,
`gate_proj`, `up_proj`, `down_proj`, `w1`, `w2` or `w3`, for the experts of older transformers: it adapts today's
experts and routers, and not the dense or shared MLP of that name. Weft never does: `all-linear` means linear modules,
and experts and routers are named. Therefore `adapter_config.json` always lists modules, and on bases with experts it
names the weights of such linear modules under `target_parameters` (`model.layers.0.mlp.down_proj.weight`), where peft
computes the same with the same tensors. Two things follow: there `lora_dropout` reads 0 (training used the job's, which
`weft.json` holds), and peft refuses such a file if it uses DoRA. Weft loads what peft saves, whichever way it came
about.

**Names that peft changes.** peft sends the names in a LoRA file through transformers' list of renamed tensors. On a few
types that list also matches names that are right already (Laguna's `shared_experts`), and the tensors would be lost
without a word, also those that peft itself saved. Weft's files then give these modules the name that leads to them
(`shared_expert`); `weft.json` says which (`renamed`), and Weft reads both. A module to which no name leads (the
`weight_proj` of Inkling 2) is left out of `all-linear`, and refused where `target_modules` names it.

"""


def page(table: dict[str, Any], speed: dict[str, Any], alpaca: dict[str, Any]) -> str:
    """The whole page."""
    parts = [_INTRO.format(**table)]
    for model in EMBEDDED_MODELS:
        parts.append(f"## On {model}\n")
        parts.append("| method | parameters | file | exact match | forgets | memory | speed |")
        parts[-1] += "\n|---|---|---|---|---|---|---|"
        for row in table[model]:
            parts.append(_row(row, speed.get(model, {}).get(row["job"], {})))
        parts.append("")
    parts.append(_ALPACA.format(**alpaca))
    parts += map(_loss_row, alpaca["rows"])
    parts.append("")
    parts.append(_EXPERTS)
    parts.append("## What each one trains\n")
    for name, cls in METHODS.items():
        text = " ".join((inspect.getdoc(inspect.getmodule(cls)) or "").split("\n\n")[0].split())
        small, large = cls.learning_rate(128), cls.learning_rate(2048)
        rate = f"{small:g}" if small == large else f"{large:g} at width 2048 and more, {small:g} at 128 and less"
        parts.append(f"**`{name}`**: {text.replace('``', '`')} Learning rate: {rate}.\n")
    return "\n".join(parts)


def _row(row: dict[str, Any], speed: dict[str, float]) -> str:
    name = f"`{row['job']}`" if row["job"] else "(the base)"
    if not row["job"]:
        return f"| {name} | | | {row['exact_match']:.1%} | | | |"
    cells = [
        name,
        f"{row['parameters']:,}",
        f"{row['file_bytes'] / 1024:,.0f} KiB",
        f"{row['exact_match']:.1%}",
        f"{row['text_loss_change']:+.2f}",
        f"{speed['training_mb']:.1f} MiB" if speed else "",
        f"{speed['speed_of_lora']:.2f}" if speed else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _loss_row(row: dict[str, Any]) -> str:
    trained = f"{row['parameters']:,} | {row['learning_rate']:.2g}" if row["job"] else " | "
    name = f"`{row['job']}`" if row["job"] else "(the base)"
    return f"| {name} | {trained} | {row['eval_loss']:.2f} | {row['text_loss']:.2f} |"


def results() -> tuple[dict[str, Any], ...]:
    """What ``page`` is made of."""
    return tuple(json.loads((RESULTS / f"methods{which}.json").read_text()) for which in ("", "_speed", "_alpaca"))


def main() -> None:
    print(page(*results()), end="")


if __name__ == "__main__":
    main()
