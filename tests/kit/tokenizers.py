"""Small tokenizers of the kinds that there are, and templates that tell them apart."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from weft.data import Conversation, Message, Sample

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Shows the thoughts of the last answer only, as the templates of several reasoning models do.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '(thought)' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(eos: str | None = "</s>", *, adds_bos: bool = False, template: str | None = None) -> Any:
    """Bytes, with merges that would reach across the seam between a prompt's end and an answer's beginning."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ċ", "a"), (":", "Ċ"), ("t", "h"), ("Ġ", "a")]
    vocab = {token: number for number, token in enumerate(alphabet + [left + right for left, right in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        bos = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>" if adds_bos else None, eos_token=eos)
    fast.chat_template = template
    return fast


def space_tokenizer() -> Any:
    """Like sentencepiece: puts a space before whatever it is given; adds BOS."""
    symbols = ["<unk>", "<s>", "</s>", "▁", *"#:[]/\n", *"abcdefghijklmnopqrstuvwxyzINSTR", "▁a"]
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in symbols[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def fallback_tokenizer() -> Any:
    """As Llama 2 has it: a space before the text, which decoding takes away, and bytes for what has no token."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789{}[]:,.-", '"', "织", "é"]
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁a", "▁▁", "▁织"]
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    merges = [("▁", "a"), ("▁", "▁"), ("▁", "织")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in symbols[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def t5_tokenizer(*, adds_bos: bool = False) -> Any:
    """Bytes, with an EOS put after every text (T5), or between two special tokens (BART)."""
    fast = byte_tokenizer(adds_bos=adds_bos)
    ends = [(token, fast.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    single = "<s> $A </s>" if adds_bos else "$A </s>"
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return fast


def bert_tokenizer(*, types: bool = True) -> Any:
    """Letters as words, [CLS] a [SEP] b [SEP], token types 0 and 1, no EOS."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    vocab = {token: number for number, token in enumerate([*special, *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        model_input_names=names,
    )  # fmt: skip


def talk(*contents: str, source: str = "d.json:7") -> Conversation:
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[index % 2], text) for index, text in enumerate(contents)), source)


def learned(tokenizer: Any, sample: Sample) -> list[str]:
    """The learned stretches of a sample, as text."""
    assert len(sample.input_ids) == len(sample.weights)
    assert sample.weights[0] == 0.0
    stretches: list[list[int]] = []
    for index, (token, weight) in enumerate(zip(sample.input_ids, sample.weights, strict=True)):
        assert weight in (0.0, 1.0)
        if weight and not sample.weights[index - 1]:
            stretches.append([])
        if weight:
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]
