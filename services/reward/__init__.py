"""Scores the episodes that were played."""
