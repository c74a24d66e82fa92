"""Submitting jepa verbs to a Ray cluster. Imports pipelines' command line and errors; never torch."""
