"""The page of a run, and the pictures on it."""

from contrast.report.page import write_report
from contrast.report.pictures import views_picture
from contrast.report.samples import save_samples

__all__ = ["save_samples", "views_picture", "write_report"]
