"""Data: files become records, records become examples, examples become token ids with loss weights."""

from weft.data.formats.detect import format_of, register_format, to_example
from weft.data.formats.examples import (
    ClassifiedText,
    Conversation,
    Example,
    LabelledAnswer,
    Message,
    PlainText,
    Preference,
    Ranking,
    Segments,
    StepLabels,
    TokenisedText,
    describe,
)
from weft.data.formats.registry import FORMATS, formats_table, known_formats
from weft.data.formats.turns import EmptyAnswerError
from weft.data.labelled import load_labelled, unlabelled_sample
from weft.data.pipeline import load_samples
from weft.data.problems import BadRecordError, Problem, Problems
from weft.data.reading.records import Record, iter_records, read_records
from weft.data.rendering.render import Renderer
from weft.data.rendering.sample import Prompt, Sample, TooLongError
from weft.data.rendering.templates import PLAIN_TEMPLATE, TEMPLATES
from weft.data.rendering.tokens import SOFT
from weft.data.sources import Mixture, Source, parse_sources, split_holdout

__all__ = [
    "FORMATS",
    "PLAIN_TEMPLATE",
    "SOFT",
    "TEMPLATES",
    "BadRecordError",
    "ClassifiedText",
    "Conversation",
    "EmptyAnswerError",
    "Example",
    "LabelledAnswer",
    "Message",
    "Mixture",
    "PlainText",
    "Preference",
    "Problem",
    "Problems",
    "Prompt",
    "Ranking",
    "Record",
    "Renderer",
    "Sample",
    "Segments",
    "Source",
    "StepLabels",
    "TokenisedText",
    "TooLongError",
    "describe",
    "format_of",
    "formats_table",
    "iter_records",
    "known_formats",
    "load_labelled",
    "load_samples",
    "parse_sources",
    "read_records",
    "register_format",
    "split_holdout",
    "to_example",
    "unlabelled_sample",
]
