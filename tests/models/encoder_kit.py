"""The old name of ``tests.kit.encoders``."""

import sys

import tests.kit.encoders

sys.modules[__name__] = tests.kit.encoders
