"""Measuring edited models: what is asked, how it is scored, and what a result is."""
