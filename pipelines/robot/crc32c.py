"""CRC32C (Castagnoli), as TFRecord files are checked with: FFmpeg's own, which PyAV brings, at several GB/s."""

import ctypes

import av._core

_POLYNOMIAL = 0x82F63B78  # of Castagnoli, lowest bit first
_MASK_DELTA = 0xA282EAD8
_ALL = 0xFFFFFFFF


def _load() -> tuple[ctypes.CDLL, ctypes.Array]:
    # Names are looked up in PyAV's module and in what it is linked with, wherever its libavutil lies.
    library = ctypes.CDLL(av._core.__file__)
    library.av_crc_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint32, ctypes.c_int]
    library.av_crc.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t]
    library.av_crc.restype = ctypes.c_uint32
    table = (ctypes.c_uint32 * 1024)()
    if library.av_crc_init(table, 1, 32, _POLYNOMIAL, ctypes.sizeof(table)):
        raise RuntimeError("FFmpeg makes no table for CRC32C")
    return library, table


_library, _table = _load()


def crc32c(data: bytes, length: int | None = None) -> int:
    """The checksum of the first `length` bytes (all by default)."""
    count = len(data) if length is None else length
    if count > len(data):
        raise ValueError(f"{count} bytes of {len(data)}")
    return _library.av_crc(_table, _ALL, data, count) ^ _ALL


def masked(data: bytes, length: int | None = None) -> int:
    """The checksum as TFRecord stores it: rotated right by 15 bits, plus a constant."""
    crc = crc32c(data, length)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & _ALL
