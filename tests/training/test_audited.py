"""Before its first step a run looks at its rendered data, and refuses what would train wrongly."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_tokenizer
from tests.data.planted import dropped_end, padded, weight_of, without_end
from tests.kit.tokenizers import talk

from weft.data import Renderer, Sample
from weft.data.auditing.audit import audit_before_training
from weft.errors import UserError
from weft.training import make_config
from weft.training.run import prepare

TOKENIZER = make_tokenizer()


def samples() -> list[Sample]:
    renderer = Renderer(TOKENIZER)
    return [renderer.sample(talk(f"Number {n}?", f"It is {n * 7}.")) for n in range(9)]


def test_good_data_passes_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert audit_before_training(Renderer(TOKENIZER), samples(), samples()) == []
    assert [message for message in caplog.messages if "records cut to max_length" not in message] == []


@pytest.mark.parametrize(
    ("code", "change"),
    [("eos-never-learned", lambda s: without_end(s, TOKENIZER)),
     ("eos-never-learned", lambda s: dropped_end(s, TOKENIZER)),
     ("nothing-to-learn", lambda s: replace(s, weights=[0.0] * len(s.weights))),
     ("pad-learned", lambda s: padded(s, TOKENIZER)),
     ("prompt-learned", lambda s: weight_of(s, list(range(1, len(s.weights))), 1.0))],
)  # fmt: skip
def test_refused(code: str, change: Any, caplog: pytest.LogCaptureFixture) -> None:
    bad = [change(sample) for sample in samples()]
    with pytest.raises(UserError, match=rf"(?s)would train wrongly:.*{code}.*weft preview.*audit: warn"):
        audit_before_training(Renderer(TOKENIZER), bad, [])
    caplog.clear()
    assert audit_before_training(Renderer(TOKENIZER), bad, [], "warn")
    assert any(message.startswith(code) for message in caplog.messages)
    caplog.clear()
    assert audit_before_training(Renderer(TOKENIZER), bad, [], "off") == []
    assert [message for message in caplog.messages if "records cut to max_length" not in message] == []


def test_one_bad_sample_of_the_evaluation_is_enough() -> None:
    held = samples()
    held[4] = without_end(held[4], TOKENIZER)
    with pytest.raises(UserError, match=r"eos-not-learned: d.json:7: .*weight 0"):
        audit_before_training(Renderer(TOKENIZER), samples(), held)


def test_a_sample_of_several_jobs_counts_once() -> None:
    shared = [without_end(sample, TOKENIZER) for sample in samples()]
    findings = audit_before_training(Renderer(TOKENIZER), [*shared, *shared], [], "warn")
    assert "of 9 samples" in findings[0].message


def run(model: Path, data: Path, **more: Any) -> Any:
    return make_config({"model": str(model), "data": str(data), "method": "lora", "steps": 1, **more})


def test_a_run_warns_of_answers_that_are_cut(tiny_llama_dir: Path, tmp_path: Path, caplog: Any) -> None:
    rows = [{"instruction": "Count.", "output": "and " * (200 if n == 3 else 5)} for n in range(6)]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING, "weft"):
        prepare(run(tiny_llama_dir, data, max_length=100, truncate=True)).adapters.close()
    (message,) = [message for message in caplog.messages if "answer-cut" in message]
    assert f"{data}:4" in message
    caplog.clear()
    with pytest.raises(UserError, match="eos-never-learned"):
        prepare(run(tiny_llama_dir, data, max_length=20, truncate=True))
    prepare(run(tiny_llama_dir, data, max_length=20, truncate=True, audit="warn")).adapters.close()
    assert any("eos-never-learned" in message for message in caplog.messages)
    caplog.clear()
    prepare(run(tiny_llama_dir, data, max_length=20, truncate=True, audit="off")).adapters.close()
    assert [message for message in caplog.messages if "records cut to max_length" not in message] == []


def test_a_run_refuses_two_bos(tmp_path: Path, tiny_llama_dir: Path, tiny_data: Path) -> None:
    import shutil

    folder = tmp_path / "twice"
    shutil.copytree(tiny_llama_dir, folder)
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"double-bos \(24 records\)"):
        prepare(run(folder, tiny_data))
