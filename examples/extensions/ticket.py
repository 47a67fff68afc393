"""A format of records: tickets of a help desk.

    {"subject": "Printer", "body": "It prints nothing.", "reply": "Is it switched on?"}

Records with these fields are recognised. `data_format: ticket` says so where another format fits too.

    weft train --extension ticket.py --model tiny-llama --data tickets.jsonl --method lora
"""

from __future__ import annotations

import weft
from weft.data import Conversation, Record


@weft.register_format(
    "ticket",
    shapes=(("subject", "body", "reply"),),
    what="a ticket of a help desk and the reply to it",
    example={"subject": "Printer", "body": "It prints nothing.", "reply": "Is it switched on?"},
)
def read_ticket(record: Record, shape: tuple[str, ...]) -> Conversation:
    """The conversation of one record."""
    subject, body, reply = (record.fields[name] for name in shape)
    if not all(isinstance(text, str) and text.strip() for text in (subject, body, reply)):
        raise weft.UserError(f"{record.source}: 'subject', 'body' and 'reply' must be text that is not empty.")
    question = weft.Message("user", f"Subject: {subject}\n\n{body}")
    return Conversation((question, weft.Message("assistant", reply)), record.source)
