"""Hand-made files, hostile or only unusual, each with what has to become of it."""

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from conftest import encode, make_frames
from fuzz_clips import (
    FRAMES,
    H264,
    Box,
    block,
    boxes,
    clips,
    ebml,
    edited,
    find,
    matroska,
    pack,
    picture,
    poked,
    put,
    remux,
    sound,
    together,
    vp8_packets,
)

BILLION = 10**9
ACCEPTED = "accepted"
STBL = "moov/trak/mdia/minf/stbl"
Expected = int | str | tuple[str, ...] | None

NO_VIDEO = ("not_a_video", "not_allowed")
SOUND = ("no_video_stream", "not_a_video", "not_allowed")


class Hostile(NamedTuple):
    """A file to try. `expected`: its count of frames, ACCEPTED with whatever count decoding gives, the reasons of which one
    must be given, or None where both a right count and any reason will do."""

    name: str
    data: bytes
    kind: str
    expected: Expected = None


def every() -> Iterator[Hostile]:
    """All of them."""
    groups = {
        "no video": no_videos(),
        "wrong extension": wrong_extensions(),
        "playlist": playlists("file:///etc/hostname", "http://127.0.0.1:9/x.ts"),
        "no video stream": without_video(),
        "giant picture": giant_pictures(),
        "billion frames": billions(),
        "compressed": compressed(),
        "encrypted": encrypted(),
        "edit list": edit_lists(),
        "times": times(),
        "streams": streams(),
        "mp4 structure": mp4_structure(),
        "mp4 fields": mp4_fields(),
        "other structure": other_structure(),
    }
    for kind, group in groups.items():
        for name, data, expected in group:
            yield Hostile(name, data, kind, expected)


Group = Iterator[tuple[str, bytes, Expected]]


def h264() -> bytes:
    return clips()["h264.mp4"].data


def no_videos() -> Group:
    yield "nothing.mp4", b"", ("empty",)
    yield "one byte.mp4", b"\0", NO_VIDEO
    yield "text.mp4", b"not a video at all\n" * 100, NO_VIDEO
    yield "page.mkv", b"<!DOCTYPE html><html><body><video src='http://127.0.0.1:9/x.mp4'></video></body></html>\n", NO_VIDEO
    yield "program.mp4", b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 2, 62, 1) + bytes(4096), NO_VIDEO
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr(zipfile.ZipInfo("video.mp4"), h264())
    yield "archive.mp4", archive.getvalue(), None
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as out:
        info = tarfile.TarInfo("video.mp4")
        info.size = len(h264())
        out.addfile(info, io.BytesIO(h264()))
    yield "archive.tar", archive.getvalue(), None
    yield "zeros.mp4", bytes(1 << 20), NO_VIDEO
    yield "ones.mkv", b"\xff" * 100_000, NO_VIDEO
    yield "noise.mp4", np.random.default_rng(7).bytes(100_000), None
    yield "screen.nfo", b"\x1b[2J\x1b[31mhello\r\n" * 200, NO_VIDEO
    yield "magic alone.mp4", b"\0\0\0\x18ftypisom", NO_VIDEO
    yield "magic alone.mkv", bytes.fromhex("1A45DFA3"), NO_VIDEO
    yield "magic alone.avi", b"RIFF\xff\xff\xff\xffAVI ", None
    yield "magic alone.ts", b"\x47" * 188 * 20, None
    yield "document.mp4", b"%PDF-1.7\n" + b"1 0 obj\n<<>>\nendobj\n" * 100, NO_VIDEO


def wrong_extensions() -> Group:
    yield "png.mp4", picture("PNG"), None
    yield "jpeg.mkv", picture("JPEG"), None
    yield "webp.webm", picture("WEBP"), None
    yield "mp4.avi", h264(), FRAMES
    yield "avi.mp4", clips()["mpeg4.avi"].data, FRAMES
    yield "mkv.ts", clips()["h264.mkv"].data, FRAMES
    yield "ts.txt", clips()["h264.ts"].data, FRAMES
    yield "webm.m3u8", clips()["vp9.webm"].data, FRAMES
    yield "mp4 without extension", h264(), FRAMES
    yield "mp4.mp3", h264(), FRAMES
    yield "mp4.png", h264(), FRAMES
    yield "%03d.jpg", clips()["hevc.mp4"].data, FRAMES
    yield "wav.mp4", sound("pcm_s16le", "wav"), SOUND
    yield "http:127.0.0.1.mp4", h264(), FRAMES


def playlists(file: str, url: str) -> Group:
    """Files that name another file or a host; whoever follows them reads what it must not."""
    head = "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:5\n#EXT-X-MEDIA-SEQUENCE:0\n"
    end = "#EXT-X-ENDLIST\n"
    path = file.removeprefix("file://")
    lists = {
        "names a file.m3u8": f"{head}#EXTINF:5,\n{file}\n{end}",
        "names a file.mp4": f"{head}#EXTINF:5,\n{path}\n{end}",
        "names a host.m3u8": f"{head}#EXTINF:5,\n{url}\n{end}",
        "names a neighbour.m3u8": f"{head}#EXTINF:5,\nsegment0.ts\n{end}",
        "key of a host.m3u8": f'{head}#EXT-X-KEY:METHOD=AES-128,URI="{url}"\n#EXTINF:5,\n{path}\n{end}',
        "map of a file.m3u8": f'{head}#EXT-X-MAP:URI="{file}"\n#EXTINF:5,\n{path}\n{end}',
        "data within.m3u8": f"{head}#EXTINF:5,\ndata:video/mp2t;base64,AAAA\n{end}",
        "chain of protocols.m3u8": f"{head}#EXTINF:5,\nconcat:{path}|{url}\n{end}",
        "subfile.m3u8": f"{head}#EXTINF:5,\nsubfile,,start,0,end,99,,:{path}\n{end}",
        "master.m3u8": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}\n",
        "local.ffconcat": f"ffconcat version 1.0\nfile '{path}'\n",
        "local.mkv": f"ffconcat version 1.0\nfile '{path}'\nfile '{path}'\n",
        "host.ffconcat": f"ffconcat version 1.0\nfile '{url}'\noption safe 0\n",
        "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 50040 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "stream.rtsp": f"rtsp://127.0.0.1:9/x\n{url}\n",
        "presentation.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT5S" minBufferTime="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
        f'<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>",
        "drawing.svg": f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="{file}"/></svg>',
        "manifest.ism": f'<SmoothStreamingMedia MajorVersion="2" Duration="9"><StreamIndex Url="{url}"/></SmoothStreamingMedia>',
    }
    for name, text in lists.items():
        yield name, text.encode(), NO_VIDEO
    body = struct.pack(">II", 0, 1)
    for kind, name in ((b"url ", file), (b"urn ", url), (b"alis", path)):
        entry = struct.pack(">I4sI", 12 + len(name) + 1, kind, 0) + name.encode() + b"\0"
        data = edited(h264(), "moov/trak/mdia/minf/dinf/dref", lambda _, entry=entry: body + entry)
        yield f"data elsewhere by {kind.decode().strip()}.mp4", data, NO_VIDEO
    # A Mac alias record with an absolute path, which demuxers follow where they are allowed to.
    record = bytearray(150)
    struct.pack_into(">HH", record, 4, 150, 2)
    tail = struct.pack(">hH", 2, len(path)) + path.encode() + b"\0" * (len(path) % 2) + struct.pack(">hH", -1, 0)
    entry = struct.pack(">I4sI", 12 + 150 + len(tail), b"alis", 0) + bytes(record) + tail
    yield "data elsewhere by alias.mov", edited(h264(), "moov/trak/mdia/minf/dinf/dref", lambda _: body + entry), NO_VIDEO


def without_video() -> Group:
    mp3 = sound("libmp3lame", "mp3")
    yield "sound.m4a", sound("aac", "ipod"), ("no_video_stream",)
    yield "sound.wav", sound("pcm_s16le", "wav"), SOUND
    yield "sound.mp3", mp3, SOUND
    yield "sound.webm", sound("libopus", "webm"), ("no_video_stream",)
    yield "sound.mkv", remux(sound("aac", "mp4"), "matroska"), ("no_video_stream",)
    cover = b"\0image/png\0\3\0" + picture("PNG")
    frame = b"APIC" + struct.pack(">IH", len(cover), 0) + cover
    size = bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0))
    yield "sound with a cover.mp3", b"ID3\3\0\0" + size + frame + mp3, SOUND
    yield "subtitles.srt", b"1\n00:00:00,000 --> 00:00:02,000\nhello\n\n" * 9, SOUND
    yield "subtitles.mkv", matroska([block(40 * k, b"hello") for k in range(9)], "S_TEXT/UTF8", kind=17), ("no_video_stream",)
    yield "attachment alone.mkv", matroska([]) + ebml("1941A469", ebml("61A7", ebml("465C", picture("JPEG")))), None
    yield "tracks without blocks.mkv", matroska([]), None
    yield "index without frames.mp4", remux(h264(), "mp4", packets=0, movflags="empty_moov"), None


def sps(width: int, height: int) -> bytes:
    """A baseline H.264 sequence parameter set that claims a picture of this size."""

    def golomb(value: int) -> str:
        return "0" * ((value + 1).bit_length() - 1) + f"{value + 1:b}"

    bits = golomb(0) * 2 + golomb(2) + golomb(1) + "0" + golomb(width // 16 - 1) + golomb(height // 16 - 1) + "11001"
    bits += "0" * (-len(bits) % 8)
    return b"\x67\x42\x00\x3e" + int("1" + bits, 2).to_bytes(len(bits) // 8 + 1, "big")[1:]


def png(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def giant_pictures() -> Group:
    """Small files that ask for a giant picture."""
    for side in (65535, 32767, 16000):
        tracks = poked(h264(), "moov/trak/tkhd", 76, "II", side << 16, side << 16)
        yield f"track header {side}.mp4", tracks, None
        yield f"sample entry {side}.mp4", poked(h264(), f"{STBL}/stsd", 40, "HH", side, side), None
    for side in (16000, 32000, 65520):
        parameters = sps(side, side)
        old = find(boxes(h264()), f"{STBL}/stsd").body
        at = old.index(b"avcC")
        length = struct.unpack_from(">H", old, at + 10)[0]
        record = old[at + 4 : at + 10] + struct.pack(">H", len(parameters)) + parameters + old[at + 12 + length :]
        entry = old[16 : at - 4] + struct.pack(">I", 8 + len(record)) + b"avcC" + record
        body = old[:8] + struct.pack(">I", 8 + len(entry)) + b"avc1" + entry
        data = edited(h264(), f"{STBL}/stsd", lambda _, body=body: body)
        yield f"parameter set {side}.mp4", data, None
        start = b"\0\0\0\1"
        yield f"parameter set {side}.h264", start + parameters + start + b"\x68\xce\x3c\x80" + (start + b"\x65\x88") * 50, None
        yield f"screen {side}.gif", put(picture("GIF", frames=3), 6, "<HH", side, side), None
        packed = zlib.compress(bytes(4_000_000), 9)
        yield f"claims {side}.png", png(side, side, 16, 6, packed), None
        yield f"claims {side}.avi", put(clips()["mpeg4.avi"].data, 64, "<II", side, side), None
    yield "all of 16000.png", png(16000, 16000, 1, 0, zlib.compress(bytes(16000 * 2001), 9)), None
    jpeg = picture("JPEG")
    yield "claims 65500.jpg", put(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", 65500, 65500), None
    webp = picture("WEBP")
    yield "claims 16383.webp", put(webp, webp.index(b"\x9d\x01\x2a") + 3, "<HH", 16383, 16383), None
    vp8, start = clips()["vp8.webm"].data, b"\x9d\x01\x2a"
    yield "key frames 16383.webm", vp8.replace(start + b"\x60\x00\x40\x00", start + b"\xff\x3f\xff\x3f"), None
    vp9 = clips()["vp9.webm"].data
    at = vp9.index(b"\x49\x83\x42") + 3
    yield "key frame 65536.webm", vp9[:at] + bytes([vp9[at] | 15]) + b"\xff" * 4 + vp9[at + 5 :], None
    yield "claims 65535.y4m", b"YUV4MPEG2 W65535 H65535 F25:1\nFRAME\n" + bytes(99), None
    yield "claims 10^9.mkv", clips()["h264.mkv"].data.replace(b"\xb0\x81\x60\xba\x81\x40", b"\xb0\x84\x3b\x9a\xca\x00"), None
    wide = encode(make_frames(2, 8192, 16), options=H264)
    yield "8192 wide and true.mp4", wide, 2


def billions() -> Group:
    """Claims of 10^9 frames, and files whose frames cost almost nothing."""
    yield "durations.mp4", poked(h264(), f"{STBL}/stts", 8, "I", BILLION), None
    yield "number of durations.mp4", poked(h264(), f"{STBL}/stts", 4, "I", BILLION), None
    yield "sizes.mp4", poked(h264(), f"{STBL}/stsz", 8, "I", BILLION), None
    fixed = edited(h264(), f"{STBL}/stsz", lambda _: struct.pack(">III", 0, 1, BILLION))
    yield "one size.mp4", fixed, None
    chunked = edited(fixed, f"{STBL}/stsc", lambda _: struct.pack(">IIIII", 0, 1, 1, BILLION, 1))
    yield "one size one chunk.mp4", edited(chunked, f"{STBL}/stts", lambda _: struct.pack(">IIII", 0, 1, BILLION, 1)), None
    empty = edited(chunked, f"{STBL}/stsz", lambda _: struct.pack(">III", 0, 0, BILLION))
    yield "no size one chunk.mp4", empty, None
    yield "chunks.mp4", poked(h264(), f"{STBL}/stco", 4, "I", BILLION), None
    yield "runs of chunks.mp4", poked(h264(), f"{STBL}/stsc", 4, "I", BILLION), None
    yield "composition offsets.mp4", poked(h264(), f"{STBL}/ctts", 8, "I", BILLION), None
    yield "duration.mp4", poked(h264(), "moov/trak/mdia/mdhd", 16, "I", 2**32 - 1), None
    parts = clips()["h264 fragments.mp4"].data
    yield "run.mp4", poked(parts, "moof/traf/trun", 4, "I", BILLION), None
    run = Box(b"trun", struct.pack(">III", 0x01, BILLION, 0))
    tree = boxes(parts)
    traf = find(tree, "moof/traf")
    traf.body = [box if box.kind != b"trun" else run for box in traf.body]
    yield "run without entries.mp4", pack(tree), None
    avi = clips()["mpeg4.avi"].data
    yield "length.avi", put(put(avi, avi.index(b"strh") + 40, "<I", BILLION), 48, "<I", BILLION), None
    yield "index entries.avi", put(avi, avi.index(b"idx1") + 4, "<I", BILLION), None
    if b"indx" in avi:
        yield "super index.avi", put(avi, avi.index(b"indx") + 12, "<I", BILLION), None
    laces = [block(k, b"\xff", flags=0x84) for k in range(400)]
    yield "empty laces.mkv", matroska(laces), None
    yield "one byte laces.mkv", matroska([block(k, b"\xff" + bytes(256), flags=0x84) for k in range(200)]), None
    yield "tiny frames.y4m", b"YUV4MPEG2 W2 H2 F25:1\n" + (b"FRAME\n" + bytes(6)) * 20_000, None
    image = picture("GIF", (1, 1))
    at = image.index(b"\x2c")
    yield "tiny frames.gif", image[:at] + image[at:-1] * 5_000 + b";", None
    apng = picture("PNG", frames=3)
    body = b"acTL" + struct.pack(">II", BILLION, 0)
    at = apng.index(b"acTL")
    yield "count.apng", apng[:at] + body + struct.pack(">I", zlib.crc32(body)) + apng[at + 16 :], None


def compressed() -> Group:
    """Zlib where containers allow it, in good faith and as bombs."""

    def moov(body: bytes, size: int) -> bytes:
        parts = [Box(b"dcom", b"zlib"), Box(b"cmvd", struct.pack(">I", size) + zlib.compress(body, 9))]
        tree = [box for box in boxes(h264()) if box.kind != b"moov"]
        return pack([*tree, Box(b"moov", pack([Box(b"cmov", pack(parts))]))])

    index = find(boxes(h264()), "moov").pack()
    yield "index.mov", moov(index, len(index)), None
    yield "index claims 4 GB.mov", moov(index, 2**32 - 16), None
    yield "index of 16 MB of nothing.mov", moov(bytes(16 << 20), 16 << 20), None

    def encoding(algorithm: int, settings: bytes = b"") -> bytes:
        return ebml("6D80", ebml("6240", ebml("5034", ebml("4254", algorithm) + settings)))

    packets = vp8_packets()
    frames = [block(33 * k, zlib.compress(packet), 0x80 if k == 0 else 0) for k, packet in enumerate(packets)]
    yield "frames.mkv", matroska(frames, track=encoding(0)), None
    yield "bomb of 9 MB.mkv", matroska([block(k, zlib.compress(bytes(9 << 20), 9)) for k in range(4)], track=encoding(0)), None
    yield "bomb of 64 MB.mkv", matroska([block(0, zlib.compress(bytes(64 << 20), 9))], track=encoding(0)), None
    yield "unknown algorithm.mkv", matroska(frames, track=encoding(77)), None
    stripped = [block(33 * k, packet[2:], 0x80) for k, packet in enumerate(packets)]
    yield "stripped header.mkv", matroska(stripped, track=encoding(3, ebml("4255", packets[0][:2]))), None


def encrypted() -> Group:
    key = {"encryption_key": "0123456789abcdef" * 2, "encryption_kid": "fedcba9876543210" * 2}
    locked = remux(h264(), "mp4", encryption_scheme="cenc-aes-ctr", **key)
    yield "by the book.mp4", locked, ("encrypted",)
    entry = find(boxes(locked), f"{STBL}/stsd").body
    entry = entry.replace(b"encv", b"avc1").replace(b"sinf", b"free")
    yield "called clear.mp4", edited(locked, f"{STBL}/stsd", lambda _: entry), None

    def called_locked(body: bytes) -> bytes:
        scheme = Box(b"schm", struct.pack(">I4sI", 0, b"cenc", 0x10000))
        tenc = Box(b"tenc", struct.pack(">IHBB", 0, 0, 1, 8) + bytes(range(16)))
        sinf = Box(b"sinf", pack([Box(b"frma", b"avc1"), scheme, Box(b"schi", tenc.pack())])).pack()
        size = struct.unpack_from(">I", body, 8)[0] + len(sinf)
        return body[:8] + struct.pack(">I", size) + b"encv" + body[16:] + sinf

    yield "clear but called encrypted.mp4", edited(h264(), f"{STBL}/stsd", called_locked), None
    yield "entry without scheme.mp4", edited(h264(), f"{STBL}/stsd", lambda body: body.replace(b"avc1", b"encv", 1)), None
    yield "unknown entry drmi.mp4", edited(h264(), f"{STBL}/stsd", lambda body: body.replace(b"avc1", b"drmi", 1)), None
    encryption = ebml("6D80", ebml("6240", ebml("5033", 1) + ebml("5035", ebml("47E1", 5) + ebml("47E2", bytes(16)))))
    noise = np.random.default_rng(3)
    frames = [block(33 * k, b"\1" + bytes(8) + noise.bytes(len(packet))) for k, packet in enumerate(vp8_packets())]
    yield "by the book.webm", matroska(frames, track=encryption), ("encrypted",)
    frames = [block(33 * k, packet) for k, packet in enumerate(vp8_packets())]
    yield "clear but called encrypted.webm", matroska(frames, track=encryption), None


def edit_lists() -> Group:
    def edits(*entries: tuple[int, int, int], count: int | None = None, source: bytes | None = None) -> bytes:
        body = struct.pack(">II", 0, len(entries) if count is None else count)
        body += b"".join(struct.pack(">IiI", *entry) for entry in entries)
        return edited(source or h264(), "moov/trak/edts", lambda _: [Box(b"elst", body)])

    scale = struct.unpack_from(">I", find(boxes(h264()), "moov/trak/mdia/mdhd").body, 12)[0]
    rate, frame = 1 << 16, scale // 30
    yield "none.mp4", edited(h264(), "moov/trak", lambda tree: [box for box in tree if box.kind != b"edts"]), FRAMES
    yield "whole.mp4", edits((800, 2 * frame, rate)), FRAMES
    yield "begins late.mp4", edits((500, -1, rate), (800, 2 * frame, rate)), ACCEPTED
    yield "trims the start.mp4", edits((400, 12 * frame, rate)), ACCEPTED
    yield "trims the end.mp4", edits((300, 2 * frame, rate)), ACCEPTED
    simple = clips()["h264 no b-frames.mov"].data
    yield "without b-frames trims the start.mov", edits((400, 9 * frame, rate), source=simple), ACCEPTED
    yield "plays twice.mp4", edits((800, 2 * frame, rate), (800, 2 * frame, rate)), None
    yield "plays backwards.mp4", edits((300, 14 * frame, rate), (300, 2 * frame, rate)), None
    yield "keeps nothing.mp4", edits((0, 2 * frame, rate)), None
    yield "behind the end.mp4", edits((800, 10**8, rate)), None
    yield "time -2.mp4", edits((800, -2, rate)), None
    yield "negative time.mp4", edits((800, -(2**31), rate)), None
    yield "huge duration.mp4", edits((2**32 - 1, 2 * frame, rate)), None
    yield "rate 0.mp4", edits((800, 2 * frame, 0)), None
    yield "half rate.mp4", edits((800, 2 * frame, rate // 2)), None
    yield "billion entries.mp4", edits((800, 2 * frame, rate), count=BILLION), None
    yield "a thousand edits.mp4", edits(*[(33, 2 * frame, rate)] * 1_000), None
    body = struct.pack(">IIQqI", 1 << 24, 1, 2**64 - 1, 2**63 - 1, rate)
    yield "64 bit.mp4", edited(h264(), "moov/trak/edts", lambda _: [Box(b"elst", body)]), None


def times() -> Group:
    clip = make_frames(FRAMES)
    irregular = np.cumsum(np.random.default_rng(5).integers(1, 9, FRAMES)).tolist()
    yield "irregular.mp4", encode(clip, pts=irregular, options=H264), FRAMES
    yield "irregular.mkv", remux(encode(clip, pts=irregular, options=H264), "matroska"), FRAMES
    yield "an hour between.mp4", encode(clip[:3], pts=[0, 1, 30 * 3600], options=H264), 3
    late = [k + 108_000 for k in range(FRAMES)]
    yield "starts after an hour.mkv", remux(encode(clip, pts=late, options=H264), "matroska"), FRAMES
    yield "one frame.mp4", encode(clip[:1], options=H264), 1
    yield "one frame.webm", matroska([block(0, vp8_packets()[0])]), 1
    yield "without any.h264", remux(h264(), "h264"), None
    yield "without any.ivf", remux(clips()["vp9.webm"].data, "ivf"), None
    yield "only decode times.avi", remux(clips()["h264.ts"].data, "avi"), None
    packets = vp8_packets()
    yield "all equal.mkv", matroska([block(0, packet) for packet in packets]), None
    yield "pairs equal.mkv", matroska([block(33 * (k // 2), packet) for k, packet in enumerate(packets)]), None
    yield "backwards.mkv", matroska([block(3000 - 33 * k, packet) for k, packet in enumerate(packets)]), None
    yield "negative.mkv", matroska([block(33 * k - 900, packet) for k, packet in enumerate(packets)]), None
    yield "jump.mkv", matroska([block(33 * k if k % 5 else 32767, packet) for k, packet in enumerate(packets)]), None
    for name, value in (("far", 2**62), ("beyond", 2**63 - 1), ("wrapped", 2**64 - 1)):
        data = matroska([block(33 * k, packet) for k, packet in enumerate(packets)])
        yield f"{name}.mkv", data.replace(ebml("E7", 0), ebml("E7", value)), None
    for scale in (0, 1, 2**31 - 1, 2**32 - 1):
        yield f"time scale {scale}.mp4", poked(h264(), "moov/trak/mdia/mdhd", 12, "I", scale), None
        yield f"movie time scale {scale}.mp4", poked(h264(), "moov/mvhd", 12, "I", scale), None
    for step in (0, 1, 2**31 - 1, 2**32 - 1):
        yield f"step {step}.mp4", poked(h264(), f"{STBL}/stts", 12, "I", step), None
    yield "composition offset 2^31.mp4", poked(h264(), f"{STBL}/ctts", 12, "I", 2**31 - 1), None
    yield "without composition offsets.mp4", edited(h264(), STBL, lambda tree: [b for b in tree if b.kind != b"ctts"]), None
    ts = clips()["h264.ts"].data
    yield "looped.ts", ts * 3, None


def streams() -> Group:
    other = encode(make_frames(11, 160, 128, seed=1), options=H264)
    mpeg4 = clips()["mpeg4.avi"].data
    yield "two videos.mkv", together(h264(), other), ACCEPTED
    yield "two videos.ts", remux(together(h264(), other), "mpegts"), ACCEPTED
    yield "video and sound.mkv", together(h264(), sound("aac", "mp4")), FRAMES
    yield "sound and video.mp4", remux(together(sound("aac", "mp4"), h264()), "mp4"), FRAMES
    yield "two codecs.mkv", together(h264(), clips()["vp9.webm"].data, remux(mpeg4, "mp4")), ACCEPTED
    for count in (2, 100, 1200):
        tree = boxes(h264())
        moov = find(tree, "moov")
        tracks = []
        for number in range(2, count + 1):
            track = boxes(find(tree, "moov/trak").pack())[0]
            head = find([track], "trak/tkhd")
            head.body = put(head.body, 12, ">I", number)
            tracks.append(track)
        moov.body = [*moov.body, *tracks]
        yield f"{count} tracks over the same data.mp4", pack(tree), ACCEPTED if count == 2 else None
    yield "same track twice.mp4", edited(h264(), "moov", lambda tree: [*tree, find(tree, "trak")]), None
    many = [ebml("AE", ebml("D7", n) + ebml("73C5", n) + ebml("83", 1) + ebml("86", b"V_VP8")) for n in range(2, 2000)]
    data = matroska([block(33 * k, packet) for k, packet in enumerate(vp8_packets())])
    at = data.index(bytes.fromhex("1F43B675"))
    yield "2000 tracks.mkv", data[:at] + ebml("1654AE6B", b"".join(many)) + data[at:], None
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    yield "turned by 90.mp4", poked(h264(), "moov/trak/tkhd", 40, "36s", turned), FRAMES
    skewed = struct.pack(">9i", 2**31 - 1, -(2**31), 7, 0, 0, 0, 9, 9, 0)
    yield "turned by nonsense.mp4", poked(h264(), "moov/trak/tkhd", 40, "36s", skewed), None
    small, large = encode(make_frames(8), "mpeg2video", "mpegts"), encode(make_frames(8, 160, 128), "mpeg2video", "mpegts")
    yield "size changes.ts", small + large, None
    yield "codec changes.ts", clips()["mpeg2.ts"].data + clips()["h264.ts"].data, None


def mp4_structure() -> Group:
    """Boxes that lie about their size, are missing, doubled, nested or point outside."""
    tree = boxes(h264())
    kinds = [box.kind for box in tree]
    moov = find(tree, "moov").pack()
    front, mdat = pack(tree[: kinds.index(b"moov")]), find(tree, "mdat").pack()
    for size in (0, 1, 4, 7, 8, 9, len(moov) - 1, len(moov) + 1, 2**31 - 1, 2**31, 2**32 - 1):
        expected = FRAMES if size == 0 else None  # zero: as far as the end of the file
        yield f"moov of size {size}.mp4", front + struct.pack(">I", size) + moov[4:], expected
    for size in (0, 15, 16, 2**63 - 1, 2**63, 2**64 - 1):
        yield f"moov of long size {size}.mp4", front + struct.pack(">I4sQ", 1, b"moov", size) + moov[8:], None
    yield "moov of true long size.mp4", front + struct.pack(">I4sQ", 1, b"moov", len(moov) + 8) + moov[8:], FRAMES
    yield "mdat reaches over moov.mp4", h264().replace(mdat, struct.pack(">I", len(mdat) + 500) + mdat[4:]), None
    yield "no media data.mp4", front.replace(mdat, b"") + moov, None
    yield "no index.mp4", front, NO_VIDEO
    yield "type box alone.mp4", tree[0].pack(), NO_VIDEO
    yield "two indexes.mp4", h264() + moov, None
    yield "index of another.mp4", front + find(boxes(clips()["mpeg4.mp4"].data), "moov").pack(), None
    yield "file twice.mp4", h264() * 2, None
    yield "no type box.mp4", moov + front, None
    yield "junk behind.mp4", h264() + np.random.default_rng(1).bytes(5000), None
    yield "free box to the end of time.mp4", h264() + struct.pack(">I4sQ", 1, b"free", 2**63 - 1), None
    nested = b""
    for _ in range(5_000):
        nested = struct.pack(">I4s", len(nested) + 8, b"moov") + nested
    yield "5000 boxes deep.mp4", front + nested, None
    nested = b""
    for k in range(5_000):
        nested = struct.pack(">I4s", len(nested) + 8, (b"udta", b"trak", b"mdia", b"meta")[k % 4]) + nested
    yield "5000 kinds deep.mp4", front + Box(b"moov", nested).pack(), None
    yield "100,000 empty boxes.mp4", struct.pack(">I4s", 8, b"free") * 100_000, None
    parts = clips()["h264 fragments.mp4"].data
    split = boxes(parts)
    first = next(k for k, box in enumerate(split) if box.kind == b"moof")
    yield "fragments without index.mp4", pack(split[first:]), None
    yield "fragments backwards.mp4", pack(split[:first] + split[first:][::-1]), None
    yield "fragment of another track.mp4", poked(parts, "moof/traf/tfhd", 4, "I", 77), None
    yield "fragment offset outside.mp4", poked(parts, "moof/traf/trun", 8, "i", -(2**31)), None
    yield "fragment lost.mp4", pack(split[:first] + split[first + 2 :]), None
    yield "fragments twice.mp4", pack(split + split[first:]), None


def mp4_fields() -> Group:
    """One field of the index set to something else."""
    for offset in (0, 7, len(h264()) - 5, len(h264()), 2**31, 2**32 - 1):
        yield f"chunk at {offset}.mp4", poked(h264(), f"{STBL}/stco", 8, "I", offset), None
    for count in (0, 1, 23, 25, 10_000):
        yield f"{count} samples.mp4", poked(h264(), f"{STBL}/stsz", 8, "I", count), None
    for size in (0, 1, 2**31 - 1, 2**32 - 1):
        yield f"first sample of {size} bytes.mp4", poked(h264(), f"{STBL}/stsz", 12, "I", size), None
    yield "chunks from 0.mp4", poked(h264(), f"{STBL}/stsc", 8, "III", 0, 0, 0), None
    yield "key frames nowhere.mp4", poked(h264(), f"{STBL}/stss", 8, "I", 2**32 - 1), None
    yield "no key frames.mp4", edited(h264(), f"{STBL}/stss", lambda _: bytes(8)), None
    yield "handler sound.mp4", poked(h264(), "moov/trak/mdia/hdlr", 8, "4s", b"soun"), None
    yield "handler nonsense.mp4", poked(h264(), "moov/trak/mdia/hdlr", 8, "4s", b"\0\xff\0\xff"), None
    for codec in (b"hvc1", b"vp09", b"av01", b"mp4v", b"jpeg", b"raw ", b"tmcd", b"\0\0\0\0"):
        name = codec.decode().strip().replace("\0", "0")
        yield f"says {name}.mp4", edited(h264(), f"{STBL}/stsd", lambda body, codec=codec: body.replace(b"avc1", codec, 1)), None
    for box in (b"stsd", b"stts", b"stsz", b"stsc", b"stco", b"stss"):
        data = edited(h264(), STBL, lambda tree, box=box: [b for b in tree if b.kind != box])
        yield f"without {box.decode()}.mp4", data, None
    at = h264().index(b"avcC")
    yield "decoder configuration garbled.mp4", put(h264(), at + 4, "8s", b"\xff" * 8), None
    yield "decoder configuration renamed.mp4", h264().replace(b"avcC", b"xxxx"), None
    yield "no entry.mp4", poked(h264(), f"{STBL}/stsd", 4, "I", 0), None
    yield "billion entries.mp4", poked(h264(), f"{STBL}/stsd", 4, "I", BILLION), None
    yield "duration 0.mp4", poked(poked(h264(), "moov/mvhd", 16, "I", 0), "moov/trak/mdia/mdhd", 16, "I", 0), None


def other_structure() -> Group:
    """Matroska, AVI, transport stream, FLV, GIF."""
    packets = vp8_packets()
    good = matroska([block(33 * k, packet, 0x80 if k % 12 == 0 else 0) for k, packet in enumerate(packets)])
    cluster = good.index(bytes.fromhex("1F43B675"))
    yield "by hand.mkv", good, FRAMES
    for size in (0, 3, 2**55, (1 << 56) - 2, (1 << 56) - 1):
        expected = FRAMES if size == (1 << 56) - 1 else None  # all ones: length unknown
        yield f"cluster of {size}.mkv", put(good, cluster + 4, ">Q", (1 << 56) | size), expected
        yield f"segment of {size}.mkv", put(good, good.index(bytes.fromhex("18538067")) + 4, ">Q", (1 << 56) | size), None
    nested = b""
    for _ in range(3_000):
        nested = ebml("1F43B675", nested)
    yield "3000 deep.mkv", good[:cluster] + nested, None
    seek = ebml("114D9B74", ebml("4DBB", ebml("53AB", bytes.fromhex("114D9B74")) + ebml("53AC", 0)))
    yield "seek head to itself.mkv", good[:cluster] + seek * 20 + good[cluster:], None
    yield "codec data of 1 GB.mkv", good.replace(ebml("83", 1), ebml("83", 1) + ebml("63A2", b"x", size=1 << 30)), None
    yield "frame of 1 GB.mkv", good[:cluster] + ebml("1F43B675", ebml("E7", 0) + ebml("A3", b"\x81\0\0\x80x", size=1 << 30)), None
    yield "false laces.mkv", matroska([block(33 * k, b"\xfe" + packet, 0x86) for k, packet in enumerate(packets)]), None
    yield "track 0.mkv", good.replace(ebml("D7", 1), ebml("D7", 0)), None
    yield "another track's blocks.mkv", matroska([ebml("A3", b"\x82" + bytes(3) + packet) for packet in packets]), None
    blocks = [block(33 * k, packet) for k, packet in enumerate(packets)]
    yield "unknown codec.mkv", matroska(blocks, "V_NONSENSE"), None
    yield "h264 without codec data.mkv", matroska(blocks, "V_MPEG4/ISO/AVC"), None
    avi = clips()["mpeg4.avi"].data
    yield "no index.avi", avi[: avi.index(b"idx1")], None
    yield "length 0.avi", put(avi, 4, "<I", 0), None
    yield "list of 4 GB.avi", put(avi, avi.index(b"movi") - 4, "<I", 2**32 - 1), None
    yield "frame of 4 GB.avi", put(avi, avi.index(b"00dc", avi.index(b"movi")) + 4, "<I", 2**32 - 1), None
    yield "scale 0.avi", put(avi, avi.index(b"strh") + 28, "<II", 0, 0), None
    yield "packed chunks upper case.avi", avi.replace(b"00dc", b"99dc"), None
    ts = clips()["h264.ts"].data
    yield "first packet lost.ts", ts[188:], None
    yield "a byte lost.ts", ts[:5000] + ts[5001:], None
    yield "tables alone.ts", ts[: 188 * 3], None
    yield "nothing but stuffing.ts", b"\x47\x1f\xff\x10" * 47 * 100, None
    yield "bytes between packets.m2ts", b"".join(b"\0\0\0\0" + ts[k : k + 188] for k in range(0, len(ts), 188)), None
    yield "every packet twice.ts", b"".join(ts[k : k + 188] * 2 for k in range(0, len(ts), 188)), None
    flv = clips()["h264.flv"].data
    yield "tag of 16 MB.flv", put(flv, 13 + 1, ">BH", 255, 65535), None
    yield "tags without end.flv", flv + flv[13:] * 3, None
    gif = picture("GIF", frames=4)
    yield "no trailer.gif", gif[:-1], None
    yield "no size.gif", put(gif, 6, "<HH", 0, 0), None
    yield "blocks without end.gif", gif[:-1] + b"\x21\xff" + b"\xff" * 50_000, None
    yield "unusual container.nut", remux(h264(), "nut"), None
