"""Evaluation: what edited models are asked, how it is scored, kept and reported."""
