"""The old name of ``tests.kit.tokenizers``."""

import sys

import tests.kit.tokenizers

sys.modules[__name__] = tests.kit.tokenizers
