"""Every recipe is a complete run: it is loaded as it stands and run at a small size, on real data where it names it."""

import itertools
import json
import os
from pathlib import Path

import pytest
import yaml

from weft.generation import Request, generate
from weft.generation.rollouts import writer
from weft.generation.text import decode
from weft.training import load_config
from weft.training.run import train

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def shared_data() -> Path:
    return Path(os.environ.get("WEFT_SHARED_DATA", ROOT.parent / "shared" / "data"))


def load(name: str, out: Path, *overrides: str):
    recipe = ROOT / "recipes" / f"{name}.yaml"
    values = yaml.safe_load(recipe.read_text())
    moved = [f"output_dir={out}"]
    for key in ("model", "data", "eval_data"):
        if str(values.get(key)).startswith("../shared/data"):
            found = shared_data() / Path(values[key]).relative_to("../shared/data")
            if not found.exists():
                pytest.skip(f"needs the shared data: {found} is absent")
            moved.append(f"{key}={found}")
    if "/" in str(values["data"]) and not Path(values["data"]).suffix:
        # A recipe for a hub: here the same file with its architecture shrunk, on the same kind of instructions.
        found = shared_data() / "sft" / "alpaca_gpt4_zh.json"
        if not found.exists():
            pytest.skip(f"needs the shared data: {found} is absent")
        moved += ["shape=tiny", f"data={found}"]
    return load_config(recipe, [*moved, *overrides])


def eval_losses(folder: Path) -> list[float]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["eval_loss"] for event in events if event["event"] == "eval"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_a_configuration(recipe, tmp_path):
    assert load(recipe.stem, tmp_path / "run").jobs


def is_quick(recipe: Path) -> bool:
    """A hub's vocabulary takes half a minute, also where everything else is tiny."""
    return Path(yaml.safe_load(recipe.read_text())["data"]).suffix != ""


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(p, id=p.stem, marks=() if is_quick(p) else pytest.mark.slow) for p in RECIPES],
)
def test_every_recipe_runs(recipe, tmp_path):
    config = load(recipe.stem, tmp_path / "run", "limit=40", "eval_size=8", "steps=2", "threads=1")
    result = train(config, writer=writer)
    assert result.completed


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_llama_2_quantised(quantization, tmp_path):
    config = load(
        "llama-2-7b_alpaca-zh", tmp_path / "run", "limit=30", "eval_size=8", "steps=2", "threads=1",
        f"quantization={quantization}",
    )  # fmt: skip
    assert train(config).completed


def run_alpaca(tmp_path, *overrides: str) -> Path:
    """Interrupt the run after its second checkpoint's worth of steps, go on, and talk to what came out."""
    folder = tmp_path / "run"
    seen = []
    config = load("alpaca_stories260k", folder, *overrides)
    first = train(config, on_event=seen.append, should_stop=lambda: sum(e["event"] == "eval" for e in seen) >= 3)
    assert not first.completed
    second = train(config.model_copy(update={"resume": True}))
    assert second.completed
    losses = eval_losses(folder)
    assert len(losses) >= 4
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.8 * losses[0]
    return folder


def chat_once(folder: Path) -> str:
    from weft.data import Message
    from weft.generation.open import open_target

    opened = open_target(str(folder))
    prompt = opened.renderer.prompt_ids([Message("user", "Name a fruit.")])
    request = Request(prompt, opened.names[0], max_new_tokens=20)
    (completion,) = generate(opened.adapters, [request], stop_ids={opened.renderer.eos_token_id})
    return decode(opened.renderer.tokenizer, completion.ids)


def test_alpaca_loss_falls_resumes_and_chats(tmp_path):
    small = ("limit=400", "on_bad_record=skip", "eval_size=20", "max_length=200", "batch_size=8", "threads=1")
    folder = run_alpaca(tmp_path, "steps=20", "eval_steps=5", "save_steps=5", "learning_rate=8e-3", *small)
    assert chat_once(folder)


@pytest.mark.slow
def test_alpaca_at_full_size(tmp_path):
    folder = run_alpaca(tmp_path)
    assert chat_once(folder)
