"""Artifacts with fewer experts: which ones stay, and what it costs."""
