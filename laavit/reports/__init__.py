"""What is shown of runs: tables, figures and one self-contained page, all computed from per-sample records."""

from laavit.reports.page import build_page, write_table

__all__ = ["build_page", "write_table"]
