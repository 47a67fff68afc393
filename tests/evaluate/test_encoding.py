"""Where a context ends and its continuation begins, as tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tests.conftest import make_tokenizer
from tokenizers.processors import TemplateProcessing

from weft.errors import UserError
from weft.evaluate.encoding import encode, prefix_token, split
from weft.evaluate.questions import Continuation


def with_bos() -> Any:
    """A tokenizer that puts a token before each text, as Llama's does."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    (begin,) = tokenizer.convert_tokens_to_ids(["<|im_start|>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    return tokenizer


def test_both_are_encoded_as_one_text_and_cut_behind_the_context() -> None:
    tokenizer = make_tokenizer()
    found = split(tokenizer, "The sky is", " blue.")
    assert [*found.context, *found.ids] == tokenizer.encode("The sky is blue.")
    assert tokenizer.decode(found.context) == "The sky is"
    # White space moves: a tokenizer joins it to the next word.
    assert split(tokenizer, "The sky is \n", "blue.").context == found.context
    assert tokenizer.decode(split(tokenizer, "The sky is \n", "blue.").ids) == " \nblue."


def test_the_token_that_begins_texts_stands_once() -> None:
    tokenizer = with_bos()
    begin = tokenizer.bos_token_id
    assert encode(tokenizer, "The sky")[0] == begin
    assert encode(tokenizer, "<|im_start|>user").count(begin) == 1
    assert begin not in encode(tokenizer, "The sky", special=False)
    assert split(tokenizer, "The", " sky").context[0] == begin
    apart = split(tokenizer, "The", " sky", apart=True)
    assert apart.context[0] == begin
    assert begin not in apart.ids


def test_an_empty_context_is_the_token_that_begins_texts() -> None:
    tokenizer = make_tokenizer()  # without one; the one that ends texts stands in
    end = tokenizer.eos_token_id
    assert prefix_token(tokenizer) == end
    assert split(tokenizer, "", "sky") == Continuation([end], tokenizer.encode("sky"))
    assert split(tokenizer, "  ", "sky") == Continuation([end], tokenizer.encode("  sky"))
    assert split(tokenizer, "", "<|im_end|>sky") == Continuation([end], tokenizer.encode("sky"))
    assert prefix_token(with_bos()) == with_bos().bos_token_id


def test_what_adds_nothing_is_refused() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(UserError, match="adds no token to its context, which ends with 'The sky'"):
        split(tokenizer, "The sky", "")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither bos_token nor eos_token"):
        split(tokenizer, "", "sky")


@pytest.mark.parametrize("tokenizer", [make_tokenizer(), with_bos()])
def test_it_is_the_cut_of_lm_eval(tokenizer: Any) -> None:
    model = pytest.importorskip("lm_eval.api.model", reason='lm_eval is not installed: pip install "weft[harness]"')

    class Encodes(model.TemplateLM):
        eot_token_id = tokenizer.eos_token_id
        prefix_token_id = prefix_token(tokenizer)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encode(tokenizer, string, special=add_special_tokens)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            return [(context, ids) for _, context, ids in requests]

        loglikelihood_rolling = generate_until = None

    class Request:
        def __init__(self, *args: str) -> None:
            self.args = args

    pairs = [
        ("The sky is", " blue."),
        ("The sky is  ", "blue"),
        ("", "one, two"),
        ("", "<|im_end|>one"),
        ("Ö\n\n", "ß"),
    ]
    pairs += [("<|im_start|>user\nWhat?<|im_end|>\n", "five"), ("a", "bc")]
    theirs = Encodes().loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    ours = [split(tokenizer, *pair) for pair in pairs]
    assert [(list(one.context), list(one.ids)) for one in ours] == [(list(a), list(b)) for a, b in theirs]
