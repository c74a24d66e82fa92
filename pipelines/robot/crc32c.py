"""CRC32C (Castagnoli), masked as TFRecord files store it."""

from google_crc32c import value as crc32c

_MASK_DELTA = 0xA282EAD8


def masked(data: bytes) -> int:
    """The checksum of `data`, rotated right by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF
