"""Why an item is quarantined: a small, documented set of codes."""

REASONS = {
    "empty": "the item has no bytes",
    "not_a_video": "no allowed demuxer accepts it",
    "not_allowed": "its container or codec is outside the allow-list, or it names other files or hosts",
    "encrypted": "its packets are encrypted",
    "no_video_stream": "only audio, subtitles or data",
    "no_timestamps": "packets carry no presentation times, or not enough to order the frames",
    "too_large": "more pixels, frames, streams or bytes than the limits allow",
    "limit_memory": "reading it took more memory than the limit",
    "limit_time": "reading it took longer than the limit",
    "crashed": "the reading process died",
    "undecodable": "a packet that was tried does not decode",
    "frame_count": "decoding gives another number of frames than the packets say",
    "missing": "a list names an object that does not exist, or a tar ends before its member does",
    "changed": "the object changed while it was read",
}
"""Every reason code that ingestion may write, with its meaning. Documented in docs/ingest.md."""
