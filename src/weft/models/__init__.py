"""Architecture facts as data; loading a base."""

from weft.models.load import Base, load_base
from weft.models.proof import describe

__all__ = ["Base", "describe", "load_base"]
