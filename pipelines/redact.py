"""Secrets stay out of configurations, logs, job information and error texts.

Known as secret are the values of environment variables with telling names, what has the shape of a credential, and what stands
before the @ of a URL.
"""

import os
import re
from collections.abc import Iterable

from pipelines.errors import UsageError

HIDDEN = "***"
PLAIN = ("disabled", "required")
NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE)
POINTERS = re.compile(r"(_PATH|_FILE|_URI|_URL|_MODE|_NAME|_EXPIRATION|APPLICATION_CREDENTIALS)$", re.IGNORECASE)
"""Variables of such names tell where a secret lies, or something about it."""
SHORTEST = 8
"""Shorter values are too common to be searched for."""
SHAPES = re.compile(
    r"(?<![A-Z0-9])A(?:KIA|SIA)[A-Z0-9]{16}(?![A-Z0-9])"  # AWS access keys
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bhf_[A-Za-z0-9]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|(?<=X-Amz-Signature=)[0-9a-fA-F]{16,}|(?<=X-Amz-Credential=)[^&\s]+|(?<=X-Amz-Security-Token=)[^&\s]+"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}"
)
USERINFO = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)")


def redacted(text: str) -> str:
    """The text with everything secret in it replaced by ***."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    return USERINFO.sub(HIDDEN, SHAPES.sub(HIDDEN, text))


def refuse(words: Iterable[str]) -> None:
    """Raise UsageError for a word of a command that holds a secret: it would be written into run folders and job lists."""
    for word in words:
        if redacted(word) != word:
            raise UsageError(
                f"{redacted(word)}: this holds a secret, which would be saved with the configuration and shown in job lists: "
                "give it by the environment (AWS_* variables, RAY_AUTH_TOKEN, a Kubernetes Secret)"
            )


def _values() -> list[str]:
    """Values of secret environment variables, the longest first, so that one within another leaves nothing of it."""
    found = {
        value
        for name, value in os.environ.items()
        if NAMES.search(name) and not POINTERS.search(name) and len(value) >= SHORTEST and value.lower() not in PLAIN
    }
    return sorted(found, key=len, reverse=True)
