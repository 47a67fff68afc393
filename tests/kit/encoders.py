"""Tiny encoders with random weights, a tokenizer that encodes as BERT's does, and texts whose class can be told."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification

from weft.libraries import cache_name

VOCABULARY = 97
KINDS = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
# ELECTRA's embeddings are narrower than its blocks; the RoBERTas' positions begin after the pad token's id.
SPECIAL: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 16},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "camembert": {"pad_token_id": 1, "type_vocab_size": 1},
}
TYPED = ("bert", "electra")


def make_encoder(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """transformers' own classifier on a random body, the same at every call; biases and norms are random too."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    if kind == "distilbert":
        sizes = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
                 "max_position_embeddings": 64}  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**sizes, **SPECIAL.get(kind, {}), **more})
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.to(dtype).eval()


def token_types(kind: str, texts: list[list[int]]) -> list[list[int]]:
    """The second half of every text is another segment, where the model knows of such."""
    if kind not in TYPED:
        return []
    return [[0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2) for ids in texts]


def their_logits(model: Any, texts: list[list[int]], types: list[list[int]] | None = None) -> list[torch.Tensor]:
    """transformers' (or peft's) class logits, one text at a time; skips where peft and transformers do not fit."""
    found = []
    for index, ids in enumerate(texts):
        more = {"token_type_ids": torch.tensor([types[index]])} if types else {}
        mask = torch.ones(1, len(ids), dtype=torch.int64)
        try:
            found.append(model(input_ids=torch.tensor([ids]), attention_mask=mask, **more).logits[0])
        except ValueError as error:
            # peft looks for an argument of that name in the signature; a model that takes no cache is no such case.
            known = "Model does not support past key values" in str(error)
            if known and cache_name(model.get_base_model().base_model.forward) == "cache":
                pytest.skip(
                    f"peft {peft.__version__} classifies with prefixes only where a forward takes past_key_values; "
                    f"transformers {transformers.__version__} calls it cache"
                )
            raise
    return found


def logits_with_pefts_prefix(model: Any, texts: list[list[int]], types: list[list[int]]) -> list[torch.Tensor]:
    """transformers' own classifier on the keys and values that peft's prefix gives, which peft cannot always pass."""
    classifier = model.get_base_model()
    name = cache_name(classifier.base_model.forward)
    assert name is not None
    found = []
    for index, ids in enumerate(texts):
        more: dict[str, Any] = {name: model.get_prompt(1)}
        if types:
            more["token_type_ids"] = torch.tensor([types[index]])
        mask = torch.ones(1, model.active_peft_config.num_virtual_tokens + len(ids), dtype=torch.int64)
        found.append(classifier(input_ids=torch.tensor([ids]), attention_mask=mask, **more).logits[0])
    return found


GOOD = ("fine", "lovely", "warm", "bright", "honest")
BAD = ("dull", "broken", "cold", "stale", "clumsy")
OTHER = ("the", "film", "is", "a", "play", "and", "its", "story", "quite", "music")


def write_reviews(path: Path, count: int, seed: int = 0) -> Path:
    """Sentences with one word that tells the class, as SST-2's file is laid out (without a header)."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = int(rng.random() < 0.6)
        words = [rng.choice(OTHER) for _ in range(rng.randint(2, 6))]
        words.insert(rng.randrange(len(words)), rng.choice(GOOD if label else BAD))
        rows.append(f"{' '.join(words)}\t{label}\n")
    path.write_text("".join(rows), encoding="utf-8")
    return path


def make_word_tokenizer(texts: list[str] | None = None, size: int = 400) -> Any:
    """A lower-casing WordPiece tokenizer that puts [CLS] and [SEP] around a text or a pair; no chat template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    if texts is None:
        # The trainer numbers words in another order in every process, and with it every random embedding.
        words = [*special, *sorted({letter for word in (*GOOD, *BAD, *OTHER) for letter in word}), *GOOD, *BAD, *OTHER]
        tokenizer.model = models.WordPiece({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]")
    else:
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def save_bert(folder: Path, texts: list[str] | None = None, **sizes: Any) -> Path:
    """A folder as the hub has them: a random BERT, with its pooler and without a head, and its tokenizer."""
    from transformers import BertConfig, BertModel

    tokenizer = make_word_tokenizer(texts, sizes.pop("vocabulary", 400))
    given = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 128, "initializer_range": 0.1, **sizes}  # fmt: skip
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **given)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "bert"
    return folder
