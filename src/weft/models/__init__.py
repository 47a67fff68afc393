"""Architecture facts as data; loading a base."""

from weft.models.facts import describe
from weft.models.load import Base, load_base

__all__ = ["Base", "describe", "load_base"]
