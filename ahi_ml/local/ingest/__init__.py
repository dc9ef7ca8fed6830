"""DICOM P10 files to image sets: what an import job of the embedded store does."""
