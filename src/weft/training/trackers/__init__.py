"""Trackers: other programs that show runs. Each hears what ``metrics.jsonl`` is told, and none can end a run."""
