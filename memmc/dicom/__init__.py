"""DICOM objects to rows: parse, select, de-identify, pixels. Pure: bytes in, a row or a reason out."""
