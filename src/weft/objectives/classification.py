"""What counts the success of sequence classification."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def class_metrics(predicted: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """Five figures of how good the predictions are.

    ``accuracy``; ``majority``, the accuracy of always naming the most frequent of ``labels``; ``macro_f1``, the mean F1
    of the classes that occur; ``f1``, that of class 1 if the classes are 0 and 1 (as GLUE counts MRPC), else the mean;
    ``mcc``, Matthews' correlation.

    With c right of n and class k named p_k and true t_k times (Gorodkin 2004):
    MCC = (c n - sum p_k t_k) / sqrt((n^2 - sum p_k^2) (n^2 - sum t_k^2)); 0 where that is 0 / 0.
    """
    n, right = len(labels), sum(p == t for p, t in zip(predicted, labels, strict=True))
    named, true = Counter(predicted), Counter(labels)
    hits = Counter(p for p, t in zip(predicted, labels, strict=True) if p == t)
    classes = sorted({*named, *true})
    f1 = {k: 2 * hits[k] / (named[k] + true[k]) for k in classes}
    mean = sum(f1.values()) / len(f1)
    spread = [n * n - sum(count * count for count in found.values()) for found in (named, true)]
    covariance = right * n - sum(named[k] * true[k] for k in classes)
    return {
        "accuracy": right / n,
        "majority": max(true.values()) / n,
        "macro_f1": mean,
        "f1": f1.get(1, 0.0) if max(classes) <= 1 else mean,
        "mcc": covariance / math.sqrt(spread[0] * spread[1]) if all(spread) else 0.0,
    }
