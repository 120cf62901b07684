"""Hosts: the language models that edits are put on, where they come from and what they look like inside."""
