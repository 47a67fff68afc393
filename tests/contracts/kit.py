"""The old name of ``tests.kit``."""

import sys

import tests.kit

sys.modules[__name__] = tests.kit
