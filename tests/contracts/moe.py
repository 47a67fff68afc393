"""The old name of ``tests.kit.experts``."""

import sys

import tests.kit.experts

sys.modules[__name__] = tests.kit.experts
