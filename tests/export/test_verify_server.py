"""``weft verify`` beside a running server: a small one that answers by transformers alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.cli.main import main
from weft.errors import UserError
from weft.export.compare import verify_sides

KEY = "a-key"


@dataclass
class Answers:
    """What the server answers with; ``template``, ``shift`` and ``lost`` are its faults."""

    folder: Path
    names: tuple[str, ...] = ("tiny",)
    template: str | None = None
    shift: float = 0.0
    logprobs: bool = True
    lost: int = 0
    dtype: torch.dtype = torch.float32
    key: str | None = None

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype).eval()
        self.asked: list[dict[str, Any]] = []

    def completion(self, asked: dict[str, Any]) -> dict[str, Any]:
        """``/v1/completions``, greedily, with the fields that OpenAI's has."""
        assert asked["temperature"] == 0
        ids, texts, chosen, tops = list(asked["prompt"]), [], [], []
        for _ in range(asked["max_tokens"]):
            with torch.no_grad():
                chances = self.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            best = chances.topk(asked["logprobs"])
            token = int(best.indices[0])
            if token == self.tokenizer.eos_token_id:
                break
            ids.append(token)
            texts.append(self.tokenizer.decode([token]))
            chosen.append(float(best.values[0]) + self.shift)
            tops.append(
                {
                    self.tokenizer.decode([i]): v
                    for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                }
            )
        told = {"tokens": texts, "token_logprobs": chosen, "top_logprobs": tops[self.lost :]} if self.logprobs else None
        return {"choices": [{"index": 0, "text": "".join(texts), "finish_reason": "length", "logprobs": told}]}

    def chat(self, asked: dict[str, Any]) -> dict[str, Any]:
        """``/v1/chat/completions``; what counts is how many tokens the messages became."""
        more = {"chat_template": self.template} if self.template else {}
        ids = self.tokenizer.apply_chat_template(
            asked["messages"], add_generation_prompt=True, return_dict=False, **more
        )
        return {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": len(ids)}}


@contextmanager
def running(answers: Answers) -> Iterator[str]:
    """A server with these answers; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.reply({"object": "list", "data": [{"id": name} for name in answers.names]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers.asked.append(asked)
            self.reply(answers.chat(asked) if "messages" in asked else answers.completion(asked))

        def reply(self, value: dict[str, Any]) -> None:
            allowed = answers.key is None or self.headers.get("Authorization") == f"Bearer {answers.key}"
            data = json.dumps(value if allowed else {"error": {"message": "no key"}}).encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("What comes after two?\nCount from one to five.\n")
    return file


def verdict(folder: Path, address: str, prompts: Path, **more: Any) -> Any:
    return verify_sides(str(folder), address, prompts=prompts, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_model_on_a_server(tiny_llama_dir: Path, prompts: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(folder)
    answers = Answers(folder, dtype=dtype)
    with running(answers) as address:
        found = verdict(folder, address, prompts)
    assert found.differences == ()
    assert (found.prompts, found.renderings) == (2, 6)
    assert found.renderings_alike == found.renderings
    assert found.same == found.tokens >= 8
    assert 0 <= found.difference <= found.asked
    assert {request["model"] for request in answers.asked} == {"tiny"}


def test_faults_of_a_server(tiny_llama_dir: Path, prompts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(other)
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for answers, said in (
        (Answers(other), "answers differ: at prompt 1, token 1: the model here says"),
        (Answers(tiny_llama_dir, shift=1e-3), "log-probabilities differ by 0.001, where rounding explains"),
        (Answers(tiny_llama_dir, template=plain), "the chat templates differ: 'What comes after two?' becomes"),
    ):
        with running(answers) as address:
            assert said in " | ".join(verdict(tiny_llama_dir, address, prompts).differences)


def test_a_model_here_of_no_numbers(tiny_llama_dir: Path, prompts: Path, tmp_path: Path) -> None:
    """It is unlike every server, though nothing can be measured on it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "spoilt")
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path / "spoilt")
    with running(Answers(tiny_llama_dir)) as address:
        assert "answers differ: at prompt 1" in " | ".join(verdict(tmp_path / "spoilt", address, prompts).differences)


def test_what_a_server_must_give(
    tiny_llama_dir: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Log-probabilities, and a model that is clear; a key where it wants one."""
    with running(Answers(tiny_llama_dir, logprobs=False)) as address, pytest.raises(UserError, match="no log-prob"):
        verdict(tiny_llama_dir, address, prompts)
    with running(Answers(tiny_llama_dir, shift=float("nan"))) as address, pytest.raises(UserError, match="holds NaN"):
        verdict(tiny_llama_dir, address, prompts)
    with running(Answers(tiny_llama_dir, lost=1)) as address, pytest.raises(UserError, match="7 lists of the likel"):
        verdict(tiny_llama_dir, address, prompts)
    with running(Answers(tiny_llama_dir, names=("base", "lora"))) as address:
        with pytest.raises(UserError, match=r"has several models\. Name one .*#NAME\. There are: base, lora"):
            verdict(tiny_llama_dir, address, prompts)
        with pytest.raises(UserError, match=r"has no model 'lore'\. Did you mean 'lora'"):
            verdict(tiny_llama_dir, f"{address}#lore", prompts)
        assert verdict(tiny_llama_dir, f"{address}#lora", prompts).equal
    with running(Answers(tiny_llama_dir, key=KEY)) as address:
        words = ["verify", address, str(tiny_llama_dir), "--prompts", str(prompts)]
        assert main(words) == 2
        assert "answers with status 401" in capsys.readouterr().err
        assert main([*words, "--api-key-env", "NO_SUCH_KEY"]) == 2
        monkeypatch.setenv("SUCH_A_KEY", KEY)
        capsys.readouterr()
        assert main([*words, "--api-key-env", "SUCH_A_KEY", "--json"]) == 0
        said = capsys.readouterr().out
        assert KEY not in said
        assert json.loads(said)["a"]["name"] == address, "the sides are told in their order"
