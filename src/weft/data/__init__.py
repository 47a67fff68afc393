"""Data: files to records, records to conversations, conversations to token ids with loss weights."""

from weft.data.formats import FORMATS, Conversation, EmptyAnswerError, Message, PlainText, to_example
from weft.data.load import load_samples, split_holdout
from weft.data.records import Record, read_records
from weft.data.render import PLAIN_TEMPLATE, Renderer, Sample

__all__ = [
    "FORMATS",
    "PLAIN_TEMPLATE",
    "Conversation",
    "EmptyAnswerError",
    "Message",
    "PlainText",
    "Record",
    "Renderer",
    "Sample",
    "load_samples",
    "read_records",
    "split_holdout",
    "to_example",
]
