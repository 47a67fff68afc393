"""Data: files to records, records to conversations, conversations to token ids with loss weights."""

from weft.data.formats import (
    FORMATS,
    Classified,
    Conversation,
    EmptyAnswerError,
    Example,
    LabelledAnswer,
    Message,
    PlainText,
    Preference,
    Ranked,
    Segments,
    StepLabels,
    Tokenised,
    describe,
    format_of,
    formats_table,
    known_formats,
    to_example,
)
from weft.data.labelled import load_labelled, unlabelled_sample
from weft.data.load import load_samples, split_holdout
from weft.data.records import Record, read_records
from weft.data.render import PLAIN_TEMPLATE, Prompt, Renderer, Sample
from weft.data.tokens import SOFT

__all__ = [
    "FORMATS",
    "PLAIN_TEMPLATE",
    "SOFT",
    "Classified",
    "Conversation",
    "EmptyAnswerError",
    "Example",
    "LabelledAnswer",
    "Message",
    "PlainText",
    "Preference",
    "Prompt",
    "Ranked",
    "Record",
    "Renderer",
    "Sample",
    "Segments",
    "StepLabels",
    "Tokenised",
    "describe",
    "format_of",
    "formats_table",
    "known_formats",
    "load_labelled",
    "load_samples",
    "read_records",
    "split_holdout",
    "to_example",
    "unlabelled_sample",
]
