"""Reports: contestants beside each other, with errors, paired tests, flips, costs and forgetting."""

from weft.evaluate.report.report import Report, make_report
from weft.evaluate.report.sources import Source, find_sources
from weft.evaluate.report.writing import write_report

__all__ = ["Report", "Source", "find_sources", "make_report", "write_report"]
