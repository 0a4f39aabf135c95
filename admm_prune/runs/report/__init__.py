"""Reports: a run, a comparison and the difference of two runs, each one self-contained HTML page, from files alone."""

from __future__ import annotations

from admm_prune.runs.report.pages import REPORT, write_difference, write_report

__all__ = ["REPORT", "REPORT_PACKAGES", "write_difference", "write_report"]
REPORT_PACKAGES = ("jinja2", "matplotlib")  # without which no page can be written
