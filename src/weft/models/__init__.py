"""Facts about architectures as data, and the loading of a base."""

from weft.models.load import Base, load_base
from weft.models.proof import describe

__all__ = ["Base", "describe", "load_base"]
