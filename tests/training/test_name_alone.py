"""The name of a method is all that a job needs, on both embedded bases, for every task of the method."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import kit
from tests.kit.encoders import write_reviews

from weft.api import Adapters
from weft.assets import EMBEDDED_MODELS
from weft.data import Renderer, load_labelled, load_samples
from weft.heads.classification import ClassificationTask
from weft.methods import METHODS
from weft.models import load_base
from weft.training import Job, JobConfig, Trainer


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_every_name_alone_trains(name: str, tiny_data: Path, tmp_path: Path) -> None:
    base = load_base(name)
    adapters, renderer = Adapters(base.model, base.architecture), Renderer(base.tokenizer)
    reviews, labels = load_labelled(write_reviews(tmp_path / "train.tsv", 4), renderer)
    samples = {"causal_lm": load_samples(tiny_data, renderer)[:4], "sequence_classification": reviews}
    heads = {"causal_lm": None, "sequence_classification": ClassificationTask(labels)}
    jobs = []
    for method in kit.TRAINED:
        for task in METHODS[method].tasks & samples.keys():
            config = JobConfig(name=f"{method}-{task}", method=method, task=task, steps=2, batch_size=2)
            adapter = adapters.add(config.name, config.method_config(), head=heads[task])
            jobs.append(Job(config, adapter, samples[task]))
    Trainer(adapters, jobs, verify_packing=False).run()
    # A job also fails if nothing changed, or if a number is not finite.
    assert {job.name: job.progress.reason for job in jobs if job.progress.ended != "finished"} == {}
