"""Names shared by datasets, tasks and the training loop, in a module of their own: decode tasks start without importing torch."""

SAMPLE = "sample"
"""Sample numbers, int64 [B]."""
FAILURES = "failures"
"""JSON texts [B], empty for most: the videos that failed before this sample's own, with reasons."""
