"""One contract per method, for the inner loop (``make test-fast``); the other files here try each part of it on more
models, in more dtypes, and beside all neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import kit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from weft.api import Adapters
from weft.core.stream import Part
from weft.merge.model import merged_model
from weft.models import describe
from weft.training import Job, JobConfig, Trainer

STEPS = 2
# Where Llama's configuration has a place for biases.
BIASES = {"bitfit": {"target_modules": ["attention", "mlp"]}}


def job(adapters: Adapters, method: str) -> Job:
    """With dropout, and with batches and lengths that are each method's own."""
    number = kit.ALL.index(method)
    settings = {**kit.SETTINGS.get(method, {}), **kit.DROPOUT.get(method, {}), **BIASES.get(method, {})}
    config = JobConfig(name=method, method=method, method_settings=settings, steps=STEPS, seed=number,
                       batch_size=1 + number % 3, learning_rate=0.01)  # fmt: skip
    adapter = adapters.add(method, config.method_config(), seed=number)
    return Job(config, adapter, kit.samples(6, 3, 8 + number, seed=number))


def trained(model: nn.Module, methods: list[str]) -> tuple[Adapters, dict[str, list[Tensor]]]:
    """The open model, and every job's parameters and optimizer states."""
    adapters = Adapters(model, describe(model), exact=True)
    jobs = [job(adapters, method) for method in methods]
    Trainer(adapters, jobs, verify_packing=False).run()
    return adapters, {one.name: list(one.tensors().values()) for one in jobs}


@torch.no_grad()
def logits(adapters: Adapters, name: str | None) -> list[Tensor]:
    hidden = kit.hidden_of(adapters, [Part(name, kit.texts(3))])
    return [adapters.logits(h, [(name, len(h))]) for h in hidden]


@pytest.mark.parametrize("method", kit.ALL)
def test_trained_beside_a_neighbour_saved_loaded_and_merged(method: str, tmp_path: Path) -> None:
    model = kit.make_model("llama")
    neighbour = kit.ALL[(kit.ALL.index(method) + 1) % len(kit.ALL)]
    adapters, together = trained(model, [neighbour, method])
    adapters.close()
    adapters, alone = trained(model, [method])
    assert all(torch.equal(a, b) for a, b in zip(together[method], alone[method], strict=True))
    # Further away from where it began, so that what is lost is seen.
    kit.randomize(adapters[method])
    wanted = logits(adapters, method)
    assert kit.difference(wanted, logits(adapters, None)) > 1e-3, "the adapter does nothing"
    adapters.save(method, tmp_path)
    adapters.load("again", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(wanted, logits(adapters, "again"), strict=True))
    if method not in kit.NOT_MERGEABLE:
        merged_model(model, adapters.architecture, adapters.merge(method)).save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            plain = [merged(torch.tensor([ids])).logits[0] for ids in kit.texts(3)]
        kit.measured(f"{method}: merged - routed", kit.difference(plain, wanted), 2e-5)
    adapters.close()
