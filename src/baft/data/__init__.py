"""Benchmarks: edits with the questions that are asked about them."""
