"""Does `weft verify` pass what is sound, whatever the threads and the build of torch, and does it see what is not?

    python benchmarks/verify_sound.py make FOLDER
    python benchmarks/verify_sound.py check FOLDER --threads 1     # also 2 and 4, and with another Python
    python benchmarks/verify_sound.py report FOLDER --out benchmarks/results/NAME.md

Pairs that must be equal: adapters of all methods that can be weights, of random values, on tiny random bases of five
architectures in two dtypes, beside their merges by Weft in three dtypes and by peft in its own; merged folders beside
themselves loaded in 4 and 8 bits; adapters that cannot be weights beside copies that were loaded and saved again.
Beside every fifth merge lies one that lacks the adapter's change in one module, or has it twice.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["WEFT_CACHE_DIR"] = ""

import torch
import transformers
from safetensors.torch import load_file, save_file
from tests import kit
from tests.conftest import make_tokenizer
from tests.kit.elsewhere import rendered_here

import weft.export.folder
from weft.api import Adapters, load_base
from weft.errors import UserError
from weft.export.compare import verify_sides
from weft.export.folder import merge_folder

SIZES = {"vocab_size": 300, "eos_token_id": 2, "bos_token_id": 2, "pad_token_id": 0}
BASES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, **SIZES,
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, **SIZES,
    ),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **SIZES),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
        **SIZES,
    ),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SIZES),
}  # fmt: skip
MERGED = ("lora", "bitfit", "ia3", "ln_tuning", "llama_pro", "adalora", "vera", "trainable_tokens", "full", "freeze")
COPIED = ("prompt_tuning", "prefix_tuning", "p_tuning", "bottleneck")
DTYPES = ("float32", "bfloat16", "float16")
PROMPTS = "What comes after two?\nCount from one to five: one, two.\n"


def make(folder: Path) -> None:
    """Write all pairs, and a list of them."""
    weft.export.folder.fresh_ids = rendered_here  # a process without Weft costs seconds for each merge
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text(PROMPTS)
    pairs: list[dict[str, Any]] = []
    for kind in BASES:
        for dtype in ("float32", "bfloat16"):
            base = _base(folder / f"{kind}-{dtype}", kind, dtype)
            for method in (*MERGED, *COPIED):
                pairs += _pairs(base, method, whole=dtype == "float32", count=len(pairs))
            print(f"{base.name}: {len(pairs)} pairs", flush=True)
    (folder / "pairs.json").write_text(json.dumps(pairs, indent=1))


def _base(folder: Path, kind: str, dtype: str) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(BASES[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def _pairs(base: Path, method: str, *, whole: bool, count: int) -> Iterator[dict[str, Any]]:
    adapter = base.parent / f"{base.name}-{method}"
    try:
        _adapter(base, method, adapter)
    except UserError as error:
        print(f"  no {method} on {base.name}: {str(error)[:90]}")
        return
    about = {"base": base.name, "method": method}
    if method in COPIED:
        copy = adapter.with_name(f"{adapter.name}-copy")
        _save_again(base, adapter, copy)
        # AdapterHub's layout, that of bottlenecks, has no place for the base's name.
        yield {**about, "kind": "saved again", "a": adapter.name, "b": copy.name, "model": base.name}
        return
    for dtype in DTYPES if whole else ("bfloat16",):
        merged = adapter.with_name(f"{adapter.name}-{dtype}")
        try:
            merge_folder(adapter, merged, dtype=dtype)
        except UserError as error:
            print(f"  no merge of {method} on {base.name}: {str(error)[:90]}")
            return
        yield {**about, "kind": f"merged, {dtype}", "a": adapter.name, "b": merged.name}
        count += 1
        if count % 5 == 0:
            wrong = _fault(base, merged, times=0 if count % 10 else 2)
            yield {**about, "kind": "fault", "a": adapter.name, "b": wrong.name}
    if method == "lora":
        yield {**about, "kind": "merged by peft", "a": adapter.name, "b": _by_peft(base, adapter)}
    if method in ("lora", "ia3") and whole:
        for quantization in ("nf4", "int8"):
            name = f"{adapter.name}-float32"
            yield {**about, "kind": f"loaded in {quantization}", "a": name, "b": name, "quantization": quantization}


def _adapter(base: Path, method: str, folder: Path) -> None:
    more = {"add_missing": False} if method == "bitfit" else {}
    loaded = load_base(str(base))
    adapters = Adapters(loaded.model, loaded.architecture)
    kit.randomize(adapters.add("it", kit.method_config(method, **more), tokenizer=loaded.tokenizer), scale=0.02)
    adapters.save("it", folder)


def _save_again(base: Path, adapter: Path, folder: Path) -> None:
    loaded = load_base(str(base))
    adapters = Adapters(loaded.model, loaded.architecture)
    adapters.load("again", adapter, tokenizer=loaded.tokenizer)
    adapters.save("again", folder)


def _by_peft(base: Path, adapter: Path) -> str:
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    folder = adapter.with_name(f"{adapter.name}-peft")
    merged.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder.name


def _fault(base: Path, merged: Path, *, times: int) -> Path:
    """A copy in which one tensor has the adapter's change so many times."""
    folder = merged.with_name(f"{merged.name}-fault")
    shutil.copytree(merged, folder)
    tensors, plain = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    # What the adapter leaves alone has no change, whatever the format rounds.
    own = {
        key: plain[key].to(t.dtype).float()
        for key, t in tensors.items()
        if key in plain and t.shape == plain[key].shape
    }
    changes = {key: tensors[key].float() - weight for key, weight in own.items()}
    key = max(changes, key=lambda k: float(changes[k].abs().mean()))
    tensors[key] = (own[key] + times * changes[key]).to(tensors[key].dtype)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def check(folder: Path, threads: int) -> None:
    """Compare every pair, and add the verdicts to a file."""
    torch.set_num_threads(threads)
    with (folder / "checked.jsonl").open("a") as file:
        for pair in json.loads((folder / "pairs.json").read_text()):
            begun = time.process_time()
            verdict = verify_sides(
                str(folder / pair["a"]), str(folder / pair["b"]), prompts=folder / "prompts.txt",
                quantization=pair.get("quantization"), model=str(folder / pair["model"]) if "model" in pair else None,
            )  # fmt: skip
            found = {**pair, "threads": threads, "torch": torch.__version__, "transformers": transformers.__version__,
                     "differences": verdict.differences, "seconds": time.process_time() - begun,
                     "share": verdict.proof.precise_difference / verdict.proof.asked if verdict.proof.exact else None,
                     "rounding": verdict.proof.rounding}  # fmt: skip
            file.write(json.dumps(found) + "\n")
            if bool(verdict.differences) != (pair["kind"] == "fault"):
                print(f"WRONG: {pair}: {verdict.differences}", flush=True)


def report(folder: Path, out: Path) -> None:
    """Write the table."""
    rows = [json.loads(line) for line in (folder / "checked.jsonl").read_text().splitlines()]
    settings = sorted({(row["torch"], row["transformers"], row["threads"]) for row in rows})
    lines = [
        "# What is sound passes `weft verify`, and what is not is seen", "",
        "    python benchmarks/verify_sound.py make FOLDER",
        "    python benchmarks/verify_sound.py check FOLDER --threads 1    (and 2, 4; and by another Python)",
        "    python benchmarks/verify_sound.py report FOLDER --out THIS", "",
        "| torch | transformers | threads | sound pairs | passed | faults | seen | nearest: difference / asked | "
        "nearest: error / that of the format (at most 1.5) | CPU s a pair |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for setting in settings:
        mine = [row for row in rows if (row["torch"], row["transformers"], row["threads"]) == setting]
        sound, faults = ([r for r in mine if (r["kind"] == "fault") == wrong] for wrong in (False, True))
        share = max(r["share"] for r in sound if r["share"] is not None)
        rounding = max(r["rounding"] for r in sound if r["rounding"] is not None)
        passed, seen = sum(not r["differences"] for r in sound), sum(bool(r["differences"]) for r in faults)
        seconds = sum(r["seconds"] for r in mine) / len(mine)
        lines.append(
            f"| {' | '.join(map(str, setting))} | {len(sound)} | {passed} | {len(faults)} | {seen} | {share:.2f} | "
            f"{rounding:.2f} | {seconds:.1f} |"
        )
    first = [row for row in rows if (row["torch"], row["transformers"], row["threads"]) == settings[0]]
    lines += ["", "| pairs | how many |", "|---|---|"]
    lines += [f"| {kind} | {count} |" for kind, count in sorted(Counter(row["kind"] for row in first).items())]
    wrong = [row for row in rows if bool(row["differences"]) != (row["kind"] == "fault")]
    lines += ["", f"Wrong verdicts: {len(wrong)}."]
    lines += [f"- {row['a']} and {row['b']} ({row['kind']}): {row['differences']}" for row in wrong]
    out.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("step", choices=("make", "check", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("verify_sound.md"))
    given = parser.parse_args()
    if given.step == "make":
        make(given.folder)
    elif given.step == "check":
        check(given.folder, given.threads)
    else:
        report(given.folder, given.out)


if __name__ == "__main__":
    main()
