"""Golden numbers of preference objectives, from TRL: losses and gradients of a tiny model over padded batches.

    pip install "trl>=1.16,<1.17"
    python tools/golden.py                 # writes tests/objectives/golden.json
    python tools/golden.py --check         # compares that file with what TRL gives now
    pip download trl==0.11.4 --no-deps && unzip trl-0.11.4*.whl -d old
    python tools/golden.py --ppo old       # writes tests/objectives/golden_ppo.json: TRL has no PPO any more

The tests compare Weft's padding-free stream with the files; nobody needs TRL for that.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import math
import os
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from tests.kit import golden  # noqa: E402

FILE = Path(__file__).resolve().parents[1] / "tests" / "objectives" / "golden.json"
_NEAR = 2e-6  # TRL's logits are float32


def tokenizer() -> Any:
    """A tokenizer of the golden words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(golden.WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def found(model: Any, loss: torch.Tensor) -> dict[str, Any]:
    """The loss and the digest of all gradients."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": float(loss.detach()), "gradients": golden.digest(gradients)}


def common(folder: str) -> dict[str, Any]:
    """Settings of every trainer."""
    size = len(golden.PROMPTS)
    return {
        "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False,
        "disable_tqdm": True, "per_device_train_batch_size": size, "dataloader_pin_memory": False,
    }  # fmt: skip


def dpo(folder: str) -> dict[str, Any]:
    """Each loss of DPO's family."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": golden.PROMPTS, "chosen": golden.CHOSEN, "rejected": golden.REJECTED}
    results = {}
    for name, (settings, _) in golden.DPO.items():
        trainer = DPOTrainer(
            model=golden.model(1),
            ref_model=golden.model(2),
            args=DPOConfig(**common(folder), **settings),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer(),
        )
        batch = trainer.data_collator(list(trainer.train_dataset))
        results[name] = found(trainer.model, trainer._compute_loss(trainer.model, batch, False))
    return results


def kto(folder: str) -> dict[str, Any]:
    """KTO, whose reference point is of the whole batch."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = {"prompt": golden.PROMPTS, "completion": golden.CHOSEN, "label": golden.VERDICTS}
    trainer = KTOTrainer(
        model=golden.model(1),
        ref_model=golden.model(2),
        args=KTOConfig(**common(folder), desirable_weight=1.3, train_sampling_strategy="sequential"),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    return found(trainer.model, trainer._compute_loss(trainer.model, batch, False))


def odds() -> dict[str, Any]:
    """ORPO's and SimPO's losses of pairs, and their gradients, for mean log-probabilities of two pairs."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    device = types.SimpleNamespace(device="cpu")
    results: dict[str, Any] = {"chosen": [-0.2, -2.3, -1e-3], "rejected": [-1.7, -0.4, -8.0]}
    for name, function, own in (
        ("orpo", ORPOTrainer.odds_ratio_loss, types.SimpleNamespace(beta=0.1, accelerator=device)),
        ("simpo", CPOTrainer.cpo_loss, types.SimpleNamespace(
            beta=2.0, alpha=0.0, loss_type="simpo", simpo_gamma=0.5, label_smoothing=0.0, accelerator=device)),
    ):  # fmt: skip
        good, bad = (torch.tensor(results[k], dtype=torch.float64, requires_grad=True) for k in ("chosen", "rejected"))
        losses = function(own, good, bad)[0]
        losses = -losses if name == "orpo" else losses  # its trainer subtracts them
        losses.sum().backward()
        results[name] = {"losses": losses.tolist(), "d_chosen": good.grad.tolist(), "d_rejected": bad.grad.tolist()}
    return results


def reward(folder: str) -> dict[str, Any]:
    """A reward model with margins and centring."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = {
        "chosen": [p + c for p, c in zip(golden.PROMPTS, golden.CHOSEN, strict=True)],
        "rejected": [p + r for p, r in zip(golden.PROMPTS, golden.REJECTED, strict=True)],
        "margin": golden.MARGINS,
    }
    trainer = RewardTrainer(
        model=golden.model(1, scores=True),
        args=RewardConfig(**common(folder), center_rewards_coefficient=0.01),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    return found(trainer.model, trainer.compute_loss(trainer.model, batch))


def rollouts(folder: str) -> dict[str, Any]:
    """Each loss of GRPO, and RLOO's, for answers to one prompt that another policy wrote."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    prompt, own = golden.ids(golden.GROUP_PROMPT), [[*golden.ids(text), 1] for text in golden.GROUP]
    count, longest = len(own), max(map(len, own))
    answers = torch.tensor([one + [0] * (longest - len(one)) for one in own])
    mask = (torch.arange(longest) < torch.tensor([[len(one)] for one in own])).int()
    prompts = torch.tensor([prompt] * count)
    whole, seen = torch.cat([prompts, answers], 1), torch.cat([torch.ones_like(prompts), mask], 1)

    def logps(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found = model(whole, attention_mask=seen).logits.log_softmax(-1)[:, len(prompt) - 1 : -1]
        return found.gather(-1, answers[..., None])[..., 0]

    old = logps(golden.model(1)) + torch.tensor(
        [[golden.offset(i, t) for t in range(longest)] for i in range(count)], dtype=torch.float64
    )
    given = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": answers,
        "completion_mask": mask, "advantages": torch.tensor(golden.ADVANTAGES, dtype=torch.float64),
        "ref_per_token_logps": logps(golden.model(2)), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    shared = {**common(folder), "num_generations": count, "per_device_train_batch_size": count,
              "max_completion_length": golden.LONGEST}  # fmt: skip
    data = Dataset.from_dict({"prompt": [golden.GROUP_PROMPT, "c"]})

    def none(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    results = {}
    with tempfile.TemporaryDirectory() as base:
        golden.model(1).save_pretrained(base)  # it looks the reference up by the model's name
        from transformers import LlamaForCausalLM

        for name, (settings, _) in golden.GRPO.items():
            policy = LlamaForCausalLM.from_pretrained(base, dtype=torch.float64)
            trainer = GRPOTrainer(
                model=policy, reward_funcs=[none], args=GRPOConfig(**shared, **settings), train_dataset=data,
                processing_class=tokenizer(),
            )  # fmt: skip
            trainer.current_gradient_accumulation_steps = 1
            trainer.model.eval()
            loss = trainer._compute_loss(trainer.model, {**given, "old_per_token_logps": old})
            results[name] = found(trainer.model, loss)
        policy = LlamaForCausalLM.from_pretrained(base, dtype=torch.float64)
        trainer = RLOOTrainer(
            model=policy, reward_funcs=[none], args=RLOOConfig(**shared, beta=0.0), train_dataset=data,
            processing_class=tokenizer(),
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.eval()
        sums = {**given, "old_logps": (old * mask).sum(1), "old_per_token_logps": old}
        results["rloo"] = found(trainer.model, trainer._compute_loss(trainer.model, sums))
    return results


def ppo(folder: Path) -> dict[str, Any]:
    """PPO's token rewards, advantages, returns and losses, by the functions of an unpacked trl 0.11.4.

    Its trainer does not import any more, so the functions are taken out of it.
    """
    spec = importlib.util.spec_from_file_location("core", folder / "trl" / "core.py")
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    source = (folder / "trl" / "trainer" / "ppo_trainer.py").read_text(encoding="utf-8")
    trainer = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    wanted = ("compute_rewards", "_kl_penalty", "compute_advantages", "loss")
    taken: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "math": math, "warnings": warnings}
    taken |= {name: getattr(core, name) for name in dir(core) if not name.startswith("__")}
    for node in trainer.body:
        if isinstance(node, ast.FunctionDef) and node.name in wanted:
            exec(ast.unparse(node), taken)
    cases = {}
    for whiten in (False, True):
        own = types.SimpleNamespace(
            config=types.SimpleNamespace(
                kl_penalty="kl", gamma=0.98, lam=0.95, whiten_rewards=whiten, cliprange=0.2, cliprange_value=0.2,
                vf_coef=1.0, ratio_threshold=1e9,
            ),
            kl_ctl=types.SimpleNamespace(value=0.2),
        )  # fmt: skip
        own._kl_penalty = lambda one, two, own=own: taken["_kl_penalty"](own, one, two)
        given = golden.ppo_case(whole=whiten)
        mask, old, reference, values = (given[key] for key in ("mask", "old", "reference", "values"))
        rewards, _, _ = taken["compute_rewards"](own, given["scores"], old, reference, mask)
        values, advantages, returns = taken["compute_advantages"](own, values, rewards, mask)
        logp, predicted = (given[key].clone().requires_grad_() for key in ("logp", "predicted"))
        logits = torch.zeros(*mask.shape, 3, dtype=torch.float64)
        policy, value, _ = taken["loss"](own, old, values, logits, predicted, logp, mask, advantages, returns)
        (policy + value).backward()
        real = mask.bool()
        cases["whitened rewards" if whiten else "plain"] = {
            "advantages": advantages[real].tolist(), "returns": returns[real].tolist(), "policy": float(policy),
            "value": float(value), "d_logp": logp.grad[real].tolist(), "d_value": predicted.grad[real].tolist(),
        }  # fmt: skip
    return {"trl": "0.11.4", **cases}


def near(one: Any, two: Any) -> bool:
    """Whether two results are the same to ``_NEAR``."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(near(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(near, one, two))
    return bool(abs(one - two) <= _NEAR * (1 + abs(two))) if isinstance(one, float) else bool(one == two)


def main() -> int:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--ppo", type=Path, help="an unpacked trl 0.11.4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.ppo is not None:
        FILE.with_name("golden_ppo.json").write_text(json.dumps(ppo(options.ppo), indent=1) + "\n")
        return 0
    import trl

    with tempfile.TemporaryDirectory() as folder:
        results = {"dpo": dpo(folder), "kto": kto(folder), "odds": odds(), "reward": reward(folder)}
        results["rollouts"] = rollouts(folder)
    if options.check:
        known = json.loads(FILE.read_text())
        different = [key for key in results if not near(results[key], known[key])]
        print("different:" if different else f"as TRL {trl.__version__} gives them", *different)
        return bool(different)
    FILE.write_text(json.dumps({"trl": trl.__version__, **results}, indent=1) + "\n")
    print(f"wrote {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
