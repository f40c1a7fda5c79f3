"""Images and audio as values: base64 with the media type that their first bytes say."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from demandport.errors import TooLarge, TypeMismatch

MAX_MEDIA_BYTES = 32 * 1024 * 1024
_TYPES = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"ID3", "audio/mpeg"),
    (b"\xff\xfb", "audio/mpeg"),
    (b"OggS", "audio/ogg"),
    (b"fLaC", "audio/flac"),
)


def read_media(text: str, kind: str) -> dict[str, Any]:
    """What base64 or a data URL holds: ``{base64, media_type, bytes}``; the type is that of the data, not of the claim.

    Args:
        kind: ``image`` or ``audio``.

    Raises:
        TypeMismatch: it is no base64, or no such thing of a known type.
        TooLarge: it is over `MAX_MEDIA_BYTES`.
    """
    header, _, body = text.rpartition(",") if text.startswith("data:") else ("", "", text)
    if len(body) > MAX_MEDIA_BYTES * 4 // 3 + 4:
        raise TooLarge(f"{kind} data is over {MAX_MEDIA_BYTES} bytes")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise TypeMismatch(f"{kind} data must be base64 or a data URL") from None
    media_type = next((name for magic, name in _TYPES if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] in (b"WEBP", b"WAVE"):
        media_type = "image/webp" if data[8:12] == b"WEBP" else "audio/wav"
    if media_type is None or not media_type.startswith(kind):
        claimed = header[5:].partition(";")[0]
        raise TypeMismatch(f"this is no {kind} of a known type" + (f", though it claims {claimed}" if claimed else ""))
    return {"base64": body, "media_type": media_type, "bytes": len(data)}


def data_url(media: Any, kind: str) -> str:
    """A data URL of what `read_media` gave, or of base64 or a data URL. Raises as `read_media`."""
    found = read_media(media["base64"] if isinstance(media, dict) and "base64" in media else media, kind)
    return f"data:{found['media_type']};base64,{found['base64']}"
