"""Transfer syntaxes: what each is called, whether the data store keeps it, and how it travels.

One table, floor 1. DICOM PS3.5 section 10 and PS3.6 annex A name the syntaxes; which of them
HealthImaging keeps as imported, and the content types of its frames, are the service's.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "EXPLICIT_LE",
    "HTJ2K_LOSSLESS_RPCL",
    "IMPLICIT_LE",
    "J2K_LOSSLESS",
    "JPEG_2000",
    "JPEG_BASELINE",
    "SYNTAXES",
    "TransferSyntax",
    "describe",
]

IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
J2K_LOSSLESS = "1.2.840.10008.1.2.4.90"
HTJ2K_LOSSLESS_RPCL = "1.2.840.10008.1.2.4.202"
JPEG_2000 = ("htj2k", "j2k")  # the codecs with resolutions


@dataclass(frozen=True, slots=True)
class TransferSyntax:
    """One transfer syntax.

    Parameters
    ----------
    uid : str
        Its UID.
    name : str
        The name of the standard, shortened.
    codec : {"native", "rle", "jpeg", "jpegls", "j2k", "htj2k", "jpegxl", "video"}
        Which decoder family reads its pixel data.
    kept : bool
        Whether the data store keeps the encoded pixels as they were imported.
    content_type : str
        Content type of a frame in this syntax; empty when the data store never serves it.
    """

    uid: str
    name: str
    codec: str
    kept: bool = False
    content_type: str = ""

    @property
    def encapsulated(self) -> bool:
        """Whether pixel data comes in fragments (PS3.5 annex A.4)."""
        return self.codec != "native"


def _video(suffix: str, name: str, content_type: str) -> list[TransferSyntax]:
    uid = f"1.2.840.10008.1.2.4.{suffix}"
    return [
        TransferSyntax(uid, name, "video", True, content_type),
        TransferSyntax(f"{uid}.1", f"{name} (fragmentable)", "video", True, content_type),
    ]


_JPEG = "1.2.840.10008.1.2.4"
SYNTAXES: dict[str, TransferSyntax] = {
    syntax.uid: syntax
    for syntax in [
        TransferSyntax(IMPLICIT_LE, "Implicit VR Little Endian", "native"),
        TransferSyntax(EXPLICIT_LE, "Explicit VR Little Endian", "native", content_type="application/octet-stream"),
        TransferSyntax("1.2.840.10008.1.2.1.99", "Deflated Explicit VR Little Endian", "native"),
        TransferSyntax("1.2.840.10008.1.2.2", "Explicit VR Big Endian", "native"),
        TransferSyntax("1.2.840.10008.1.2.5", "RLE Lossless", "rle"),
        TransferSyntax(JPEG_BASELINE, "JPEG Baseline (8-bit)", "jpeg", True, "image/jpeg"),
        TransferSyntax(f"{_JPEG}.51", "JPEG Extended (12-bit)", "jpeg"),
        TransferSyntax(f"{_JPEG}.57", "JPEG Lossless (process 14)", "jpeg"),
        TransferSyntax(f"{_JPEG}.70", "JPEG Lossless (process 14, SV1)", "jpeg"),
        TransferSyntax(f"{_JPEG}.80", "JPEG-LS Lossless", "jpegls"),
        TransferSyntax(f"{_JPEG}.81", "JPEG-LS Near-lossless", "jpegls"),
        TransferSyntax(J2K_LOSSLESS, "JPEG 2000 Lossless", "j2k", content_type="image/j2c"),
        TransferSyntax(f"{_JPEG}.91", "JPEG 2000", "j2k", True, "image/j2c"),
        TransferSyntax(f"{_JPEG}.92", "JPEG 2000 Multi-component Lossless", "j2k"),
        TransferSyntax(f"{_JPEG}.93", "JPEG 2000 Multi-component", "j2k"),
        TransferSyntax(f"{_JPEG}.112", "JPEG XL", "jpegxl", True, "image/jxl"),
        TransferSyntax(f"{_JPEG}.201", "HTJ2K Lossless", "htj2k"),
        TransferSyntax(HTJ2K_LOSSLESS_RPCL, "HTJ2K Lossless RPCL", "htj2k", content_type="image/jph"),
        TransferSyntax(f"{_JPEG}.203", "HTJ2K", "htj2k", True, "image/jphc"),
        *_video("100", "MPEG2 Main Profile / Main Level", "video/mpeg"),
        *_video("101", "MPEG2 Main Profile / High Level", "video/mpeg"),
        *_video("102", "MPEG-4 AVC High Profile", "video/mp4"),
        *_video("103", "MPEG-4 AVC BD-compatible High Profile", "video/mp4"),
        *_video("104", "MPEG-4 AVC High Profile for 2D Video", "video/mp4"),
        *_video("105", "MPEG-4 AVC High Profile for 3D Video", "video/mp4"),
        *_video("106", "MPEG-4 AVC Stereo High Profile", "video/mp4"),
        # The service's own spelling of the HEVC type.
        TransferSyntax(f"{_JPEG}.107", "HEVC Main Profile", "video", True, "video/H256"),
        TransferSyntax(f"{_JPEG}.108", "HEVC Main 10 Profile", "video", True, "video/H256"),
    ]
}

# Named in errors, and no more than that: the service takes none of them, and nothing here decodes them.
_OTHERS = {
    f"{_JPEG}.{suffix}": name
    for suffix, name in {
        "52": "JPEG Extended (processes 3 and 5)",
        "53": "JPEG Spectral Selection (processes 6 and 8)",
        "54": "JPEG Spectral Selection (processes 7 and 9)",
        "55": "JPEG Full Progression (processes 10 and 12)",
        "56": "JPEG Full Progression (processes 11 and 13)",
        "58": "JPEG Lossless (process 15)",
        "94": "JPIP Referenced",
        "95": "JPIP Referenced Deflate",
        "110": "JPEG XL Lossless",
        "111": "JPEG XL JPEG Recompression",
        "204": "JPIP HTJ2K Referenced",
        "205": "JPIP HTJ2K Referenced Deflate",
    }.items()
}
_OTHERS["1.2.840.10008.1.2.1.98"] = "Encapsulated Uncompressed Explicit VR Little Endian"


def describe(uid: str) -> str:
    """Name a transfer syntax for a message: ``"1.2.840...4.90 (JPEG 2000 Lossless)"``. I/O: none."""
    syntax = SYNTAXES.get(uid)
    name = syntax.name if syntax else _OTHERS.get(uid)
    return f"{uid} ({name})" if name else f"{uid!r} (unknown)"
