"""Frozen features, measured by named protocols that never choose anything on test items."""
