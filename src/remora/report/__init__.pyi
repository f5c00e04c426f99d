from .pages import comparison_page, write_comparison, write_report

__all__ = ["comparison_page", "write_comparison", "write_report"]
