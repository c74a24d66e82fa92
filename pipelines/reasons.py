"""Why an item is quarantined, and why a conversation is refused: small, documented sets of codes."""

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

BAD_JSON, BAD_TURNS, NO_ANSWER, TEMPLATE = "bad_json", "bad_turns", "no_answer", "template"
UNKNOWN_PLACEHOLDER, PLACEHOLDER_MISMATCH = "unknown_placeholder", "placeholder_mismatch"
MISSING_MEDIA, UNREADABLE_MEDIA = "missing_media", "unreadable_media"
TOO_MANY_VISUAL_TOKENS, TOO_LONG = "too_many_visual_tokens", "too_long"
CONVERSATION_REASONS = {
    BAD_JSON: "the line is no JSON object",
    BAD_TURNS: "no list of turns, a role that nobody has, or text that is none",
    NO_ANSWER: "no turn is an answer, or the answers are empty",
    TEMPLATE: "the model's chat template does not take the turns",
    UNKNOWN_PLACEHOLDER: "a mark of a medium that is neither <image> nor <video>",
    PLACEHOLDER_MISMATCH: "other marks than media, in number or order, or marks within an answer",
    MISSING_MEDIA: "an image or video that the catalog does not hold",
    UNREADABLE_MEDIA: "an image or video of which the frames do not decode",
    TOO_MANY_VISUAL_TOKENS: "the visual tokens alone are more than language_model.max_length",
    TOO_LONG: "visual tokens and words are more than language_model.max_length",
}
"""Every reason code of a refused conversation, with its meaning. Documented in docs/align.md."""
