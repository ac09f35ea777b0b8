"""Reports: one self-contained HTML file that shows what runs measured, with figures, tables and provenance."""

from atma.report.content import Report, Run, Section, environment
from atma.report.headline import headline
from atma.report.page import page

__all__ = ["Report", "Run", "Section", "environment", "headline", "page"]
