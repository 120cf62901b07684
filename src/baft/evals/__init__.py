"""Scores of an edited model, and how sure they are."""
