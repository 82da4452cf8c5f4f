"""Evaluation of frozen features by named protocols, which choose nothing on test items."""
