"""Rebuilds the embedded bases: corpus, tokenizer, pre-training, instruction set. One command, no download.

    python tools/build_bases.py                       # everything in src/weft/assets, both bases
    python tools/build_bases.py --model tiny-llama --steps 500 --out assets

The text, the instruction set and the tokenizer are the same bytes every time. The weights are the same bits for the
same ``--steps`` and ``--threads`` on the same machine type and torch version; ``--minutes`` chooses the number of steps
by the measured speed, so it does not repeat exactly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from weft.assets import EMBEDDED_MODELS, ROOT, SPLITS
from weft.assets.world import World, build_world, corpus, instructions

END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 2304
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# One seed per stream, so that a change to one leaves the others alone.
WORLD_SEED, CORPUS_SEED, TOKENIZER_SEED, HELD_OUT_SEED, INSTRUCTION_SEED, WEIGHT_SEED = 0, 1, 2, 3, 4, 5
BASE_TEXTS = 160
BLOCK, BATCH = 128, 8
STEPS = {"tiny-llama": 2400, "tiny-bloom": 2000}
PEAK_LR = {"tiny-llama": 3e-3, "tiny-bloom": 3e-3}
WARM_UP, FINAL_LR, WEIGHT_DECAY = 100, 0.05, 0.05

Model = LlamaForCausalLM | BloomForCausalLM


def build_tokenizer(world: World, documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which a Chinese character is never merged with its neighbours.

    Without that split BPE would glue names to the words beside them, and a fact told in one wording could not be asked
    in another. The end-of-turn token also ends every document, so its embedding is trained and it can serve as bos.
    """
    tokenizer = Tokenizer(models.BPE())
    han = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([han, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD, *ROLES],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    train, _ = instructions(world, INSTRUCTION_SEED)  # so that the words of questions are not spelt letter by letter
    questions = (r["instruction"] for r in train)
    texts = itertools.chain(itertools.islice(corpus(world, TOKENIZER_SEED), documents), questions)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> Model:
    """The untrained base; sizes are chosen so that hundreds of fine-tuning steps take seconds on two cores."""
    torch.manual_seed(WEIGHT_SEED)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
    }
    if name == "tiny-llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                rms_norm_eps=1e-5,
                initializer_range=0.04,
                **ids,
            )
        )
    return BloomForCausalLM(
        BloomConfig(
            hidden_size=128,
            n_layer=4,
            n_head=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            initializer_range=0.04,
            **ids,
        )
    )


def blocks(world: World, tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Batches ``[BATCH, BLOCK + 1]`` of documents laid end to end, each closed by the end token."""
    documents, stream = corpus(world, CORPUS_SEED), []
    size, end = BATCH * (BLOCK + 1), tokenizer.eos_token_id
    while True:
        for encoding in tokenizer.backend_tokenizer.encode_batch(list(itertools.islice(documents, 1000))):
            stream += [*encoding.ids, end]
        while len(stream) >= size:
            yield torch.tensor(stream[:size]).view(BATCH, BLOCK + 1)
            del stream[:size]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a small share of the peak."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizers_for(model: Model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and all vectors; both scaled to AdamW's rates."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [embedding], "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=True),
    ]


def pretrain(name: str, model: Model, batches: Iterator[torch.Tensor], steps: int, minutes: float | None) -> float:
    """Trains in place and returns the mean loss of the last 50 steps; `minutes` replaces `steps` after 30 of them."""
    optimizers, losses, start = optimizers_for(model), [], time.perf_counter()
    model.train()
    step = 0
    while step < steps:
        if minutes is not None and step == 30:
            steps = max(60, int(minutes * 60 / ((time.perf_counter() - start) / step)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, steps, PEAK_LR[name])
        batch = next(batches)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        if step % 100 == 0 or step == steps:
            speed = step * BATCH * BLOCK / (time.perf_counter() - start)
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(f"{name} step {step}/{steps} loss {recent:.4f} {speed:,.0f} tokens/s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def settle_special_tokens(model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives the tokens that pre-training never saw the mean embedding.

    Left alone they drift: the softmax pushes the row of a token that never occurs ever further from every hidden state,
    and methods that cannot change the embedding would have to work around it.
    """
    rows = model.get_input_embeddings().weight
    unseen = tokenizer.convert_tokens_to_ids([PAD, *ROLES])
    seen = torch.ones(len(rows), dtype=torch.bool)
    seen[unseen] = False
    rows[unseen] = rows[seen].mean(0)


def save_base(model: Model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A complete Hugging Face folder. Weights are stored as bfloat16 to halve the package; the config says float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner may read


def write_texts(world: World, out: Path) -> None:
    """The instruction set and the held-out documents."""
    (out / "instructions").mkdir(parents=True, exist_ok=True)
    for split, records in zip(SPLITS, instructions(world, INSTRUCTION_SEED), strict=True):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out / "instructions" / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    (out / "base_text.txt").write_text(base_text(world), encoding="utf-8", newline="\n")


def base_text(world: World) -> str:
    """Held-out documents, one per line, with ``\\n`` for a line break inside one."""
    documents = itertools.islice(corpus(world, HELD_OUT_SEED), BASE_TEXTS)
    return "".join(document.replace("\n", "\\n") + "\n" for document in documents)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rebuild Weft's embedded bases.")
    parser.add_argument("--model", choices=EMBEDDED_MODELS, action="append", help="only this base (default: both)")
    parser.add_argument("--steps", type=int, help="pre-training steps (default: those of the committed bases)")
    parser.add_argument("--minutes", type=float, help="as many steps as fit in this time, instead of --steps")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=ROOT, help="where to write (default: the package's own assets)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    world = build_world(WORLD_SEED)
    tokenizer = build_tokenizer(world)
    write_texts(world, args.out)
    for name in args.model or EMBEDDED_MODELS:
        model, start = build_model(name, tokenizer), time.perf_counter()
        print(f"{name}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
        loss = pretrain(name, model, blocks(world, tokenizer), args.steps or STEPS[name], args.minutes)
        settle_special_tokens(model, tokenizer)
        save_base(model, tokenizer, args.out / name)
        minutes = (time.perf_counter() - start) / 60
        print(f"{name}: loss {loss:.4f} after {minutes:.1f} minutes -> {args.out / name}", flush=True)


if __name__ == "__main__":
    main()
