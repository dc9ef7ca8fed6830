"""What the reader must know of a frame, from the index alone: where, in what form, verified how."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any, Literal

from ahi_ml.codec import HTJ2K_LOSSLESS_RPCL, SYNTAXES, PixelFormat
from ahi_ml.errors import ConfigError, MetadataError
from ahi_ml.metadata import table_data
from ahi_ml.pixels import VOI_FUNCTIONS, LookupTable, Rescale, Window
from ahi_ml.types import Output

__all__ = ["FrameProfile"]

# Label Map Segmentation Storage: the SOP class of segmentations whose Segmentation Type is LABELMAP.
_LABEL_MAPS = "1.2.840.10008.5.1.4.1.1.66.7"

# Projection radiography: CR, and digital X-ray, mammography and intra-oral, for presentation and for processing.
_PROJECTIONS = frozenset(f"1.2.840.10008.5.1.4.1.1.1{kind}" for kind in ("", ".1", ".1.1", ".2", ".2.1", ".3", ".3.1"))

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrameProfile:
    """How frames of one kind are decoded, verified and turned into values.

    Parameters
    ----------
    syntax : str
        Transfer syntax the frames are stored in.
    pixels : PixelFormat
        Shape and type of their stored values.
    checksum_of : {"samples", "bytes", "unknown"}
        What their checksums are of.
    modality : Rescale or LookupTable
        Stored value to modality value.
    windows : tuple of Window
        Those the file recommends, in its order.
    voi : LookupTable or None
        VOI LUT, preferred to a window.
    palette : tuple of 3 LookupTable, or None
        Red, green and blue of a PALETTE COLOR image.
    inverted : bool
        Whether low values are white (MONOCHROME1, or an inverse presentation LUT).
    padding : tuple of (int, int or None), or None
        PixelPaddingValue and its range limit, as the tags give them.
    lossy : bool
        Whether the image was compressed lossily at some time.
    spacing : tuple of 2 floats, or None
        Pixel Spacing: between rows, between columns, mm.
    projection : bool
        Whether it is projection radiography, by its SOP class: computed, digital, mammography, or intra-oral.
    """

    syntax: str
    pixels: PixelFormat
    checksum_of: Literal["samples", "bytes", "unknown"]
    modality: Rescale | LookupTable
    windows: tuple[Window, ...]
    voi: LookupTable | None
    palette: tuple[LookupTable, LookupTable, LookupTable] | None
    inverted: bool
    padding: tuple[int, int | None] | None
    lossy: bool
    spacing: tuple[float, float] | None
    projection: bool = False

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> FrameProfile:
        """Build from a row of the ``profiles`` table.

        I/O: none.

        Raises
        ------
        MetadataError
            An attribute that decoding needs is missing.
        """
        missing = [name for name in ("Rows", "Columns", "BitsAllocated") if not row.get(name)]
        if missing:
            raise MetadataError(f"the metadata lacks {', '.join(missing)}: these frames cannot be decoded")
        signed = row["PixelRepresentation"] == 1
        pixels = PixelFormat(
            rows=row["Rows"],
            columns=row["Columns"],
            samples=row["SamplesPerPixel"] or 1,
            bits_allocated=row["BitsAllocated"],
            bits_stored=row["BitsStored"] or row["BitsAllocated"],
            signed=signed,
            photometric=row["PhotometricInterpretation"] or "",
            labels=row["SOPClassUID"] == _LABEL_MAPS,
        )
        rescale = _rescale(row)
        try:
            tables = json.loads(row["lookup_tables"]) if row["lookup_tables"] else {}
            modality = _table(tables.get("ModalityLUTSequence"), signed)
            # A VOI LUT is addressed by modality values, which are signed once an intercept is.
            voi = _table(tables.get("VOILUTSequence"), signed or rescale.intercept < 0)
            palette = _palette(tables.get("Palette"), signed)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise MetadataError(f"a look-up table of these frames cannot be used: {error}") from error
        syntax = row["StoredTransferSyntaxUID"] or HTJ2K_LOSSLESS_RPCL
        padding = row["PixelPaddingValue"]
        spacing = row["PixelSpacing"]
        return cls(
            syntax=syntax,
            pixels=pixels,
            checksum_of=_checksum_of(syntax, row["ChecksumType"], pixels),
            modality=modality or rescale,
            windows=_windows(row),
            voi=voi,
            palette=palette,
            inverted=pixels.photometric == "MONOCHROME1" or row["PresentationLUTShape"] == "INVERSE",
            padding=None if padding is None else (padding, row["PixelPaddingRangeLimit"]),
            lossy=row["LossyImageCompression"] == "01",
            spacing=(spacing[0], spacing[1]) if spacing and len(spacing) == 2 else None,
            projection=row["SOPClassUID"] in _PROJECTIONS,
        )

    @property
    def colour(self) -> bool:
        """Whether values have three channels, once a palette is applied."""
        return self.pixels.samples > 1 or self.palette is not None

    def shape(self, output: Output, reduce: int = 0) -> tuple[int, ...]:
        """Shape of a frame in an output: ``(rows, columns[, 3])``, so many resolution levels lower."""
        pixels = self.pixels.reduced(reduce) if reduce else self.pixels
        if output == "stored" or not self.colour:
            return pixels.shape
        return (pixels.rows, pixels.columns, 3)


def _checksum_of(syntax: str, kind: str | None, pixels: PixelFormat) -> Literal["samples", "bytes", "unknown"]:
    known = SYNTAXES.get(syntax)
    if known is not None and (known.kept or pixels.bits_allocated == 1):
        return "bytes"
    # Documents of the service's first years have no ChecksumType; their checksums are of the samples.
    return "samples" if kind in (None, "DECOMPRESSED") else "unknown"


def _rescale(row: dict[str, Any]) -> Rescale:
    slope, intercept = row["RescaleSlope"], row["RescaleIntercept"]
    if slope == 0:
        _LOG.info("a rescale slope of 0, which would map every pixel to one value, is taken as 1")
    if (slope is None) != (intercept is None):
        present, missing, value = ("slope", "intercept", 0) if intercept is None else ("intercept", "slope", 1)
        _LOG.info("a rescale %s without %s: the %s is taken as %d", present, missing, missing, value)
    return Rescale.from_tags(slope, intercept)


def _windows(row: dict[str, Any]) -> tuple[Window, ...]:
    function = row["VOILUTFunction"] or VOI_FUNCTIONS[0]
    if row["WindowCenter"] and function.strip().upper() not in VOI_FUNCTIONS:
        _LOG.info("a VOI LUT function that DICOM does not know is taken as its default, %s", VOI_FUNCTIONS[0])
        function = VOI_FUNCTIONS[0]
    found = []
    for center, width in zip(row["WindowCenter"] or (), row["WindowWidth"] or (), strict=False):
        try:
            found.append(Window(center, width, function))
        except ConfigError:  # widths of 0 occur in archives, and no picture can be made with them
            _LOG.info("a window of width %g is ignored", width)
    return tuple(found)


def _table(tags: dict[str, Any] | None, signed: bool) -> LookupTable | None:
    if not tags:
        return None
    descriptor, data = tags.get("LUTDescriptor"), table_data(tags.get("LUTData"))
    if not descriptor or data is None:
        return None
    return LookupTable.from_tags([int(value) for value in descriptor], data, signed)


def _palette(tags: dict[str, Any] | None, signed: bool) -> tuple[LookupTable, LookupTable, LookupTable] | None:
    if not tags:
        return None
    channels = []
    for name in ("Red", "Green", "Blue"):
        descriptor = tags.get(f"{name}PaletteColorLookupTableDescriptor")
        data = table_data(tags.get(f"{name}PaletteColorLookupTableData"))
        segments = table_data(tags.get(f"Segmented{name}PaletteColorLookupTableData"))
        if not descriptor or (data is None and segments is None):
            raise MetadataError(f"the {name.lower()} table of a PALETTE COLOR image is missing")
        numbers = [int(value) for value in descriptor]
        if data is not None:
            channels.append(LookupTable.from_tags(numbers, data, signed))
        else:
            assert segments is not None
            channels.append(LookupTable.from_segments(numbers, segments, signed))
    return channels[0], channels[1], channels[2]
