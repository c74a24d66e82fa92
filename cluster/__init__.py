"""Submitting jepa verbs to a Ray cluster. Imports pipelines' configuration and errors; never torch."""
