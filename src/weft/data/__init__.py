"""Data: files to records, records to conversations, conversations to token ids with loss weights."""

from weft.data.formats import FORMATS, Conversation, EmptyAnswerError, Message, PlainText, to_example
from weft.data.labelled import load_labelled, unlabelled_sample
from weft.data.load import load_samples, split_holdout
from weft.data.records import Record, read_records
from weft.data.render import Renderer
from weft.data.sample import Prompt, Sample, TooLongError
from weft.data.templates import PLAIN_TEMPLATE, TEMPLATES
from weft.data.tokens import SOFT

__all__ = [
    "FORMATS",
    "PLAIN_TEMPLATE",
    "SOFT",
    "TEMPLATES",
    "Conversation",
    "EmptyAnswerError",
    "Message",
    "PlainText",
    "Prompt",
    "Record",
    "Renderer",
    "Sample",
    "TooLongError",
    "load_labelled",
    "load_samples",
    "read_records",
    "split_holdout",
    "to_example",
    "unlabelled_sample",
]
