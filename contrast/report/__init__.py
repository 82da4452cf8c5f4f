"""The page of a run, and the pictures on it."""

from contrast.report.page import render
from contrast.report.pictures import views_picture
from contrast.report.record import RunRecord, without_items
from contrast.report.samples import page_arrays

__all__ = ["RunRecord", "page_arrays", "render", "views_picture", "without_items"]
