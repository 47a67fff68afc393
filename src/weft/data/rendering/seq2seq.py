"""Sequence to sequence: the input of the encoder, and the answer that the decoder learns to write."""

from __future__ import annotations

from weft.data.formats.examples import SFT, Conversation, PlainText
from weft.data.rendering.drafts import Drafter
from weft.data.rendering.sample import Draft, Prompt, Sample, TooLongError
from weft.data.rendering.transcript import learned_turns
from weft.errors import UserError


def seq2seq_sample(renderer: Drafter, example: SFT) -> Sample:
    """The last answer as ``target_ids`` and all before it as ``input_ids``.

    Raises:
        UserError: The example has no learned answer after another turn, or one that cannot be written.
        TooLongError: The input or the answer is longer than ``max_length``.
    """
    place = example.source
    if isinstance(example, PlainText):
        raise UserError(f"{place}: plain text has no answer to write; seq2seq needs a question and an answer.")
    if not isinstance(example, Conversation):
        raise UserError(f"{place}: {type(example).__name__} holds no question and answer, which seq2seq needs.")
    messages = example.messages
    learned = learned_turns(messages)
    if not learned:
        raise UserError(f"{place}: no assistant turn after another turn is learned, which seq2seq needs.")
    answer = messages[learned[-1]]
    if answer.tool_calls:
        raise UserError(f"{place}: the last answer is a tool call, which seq2seq cannot write. Remove the record.")
    if answer.loss_weight != 1.0:
        raise UserError(f"{place}: seq2seq learns answers at weight 1; this one has {answer.loss_weight:g}.")
    prompt = seq2seq_source(renderer, Conversation(messages[: learned[-1]], place, example.tools))
    # Special tokens in the text of the answer are split like other text. The tokenizer still adds its own around it.
    encoded = renderer.tokenizer(text_target=answer.content, split_special_tokens=True, verbose=False)
    target = list(encoded["input_ids"])
    target += [] if renderer.eos_token_id in target else [renderer.eos_token_id]
    limit, head, tail = renderer.settings, len(renderer.encoder.head), len(renderer.encoder.tail)
    draft = Draft(list(prompt.ids), [0.0] * len(prompt.ids), list(prompt.slots))
    draft.remove(*limit.cut_ids(prompt.ids, place, "the input", head=head, tail=tail))
    slots = tuple(draft.slots)
    if draft.cut and limit.truncation == "right":
        slots = tuple(slot for slot in slots if slot < len(draft.ids) - tail)
    if limit.exceeded(len(target)) and limit.truncation in ("left", "middle"):
        raise TooLongError(
            f"{place}: the answer is {len(target)} tokens long, max_length is {limit.max_length}, and `truncation: "
            f"{limit.truncation}` keeps answers whole. Raise `max_length`, or take `right` or `drop`."
        )
    start, stop = limit.cut_ids(target, place, "the answer")
    target = target[:start] + target[stop:]
    cut = draft.cut + stop - start
    return Sample(draft.ids, draft.weights, place, slots=slots, target_ids=tuple(target), cut=cut)


def seq2seq_source(renderer: Drafter, example: Conversation) -> Prompt:
    """The encoder's input, between the special tokens that its tokenizer puts around a text.

    Raises:
        UserError: There are no messages, or tools without a template for them.
    """
    messages, source, encoder = example.messages, example.source, renderer.encoder
    if not messages:
        raise UserError(f"{source}: there are no messages.")
    if renderer.template.origin == "fallback":  # such models were trained on bare text, not on headings
        if example.tools or any(message.tool_calls for message in messages):
            raise UserError(f"{source}: tools need a `chat_template` that renders them; the tokenizer has none.")
        ordered = sorted(messages, key=lambda message: message.role != "system")
        text = encoder.guard("\n".join(message.content for message in ordered))
    else:
        text = renderer.turns.text(example, generation=True)
    ids, slots = encoder.encode(text, first=True)
    head = encoder.missing_head(ids, bos_only=False)
    return Prompt(head + ids + encoder.missing_tail(ids), tuple(slot + len(head) for slot in slots))
