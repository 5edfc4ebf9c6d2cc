"""Storage SOP classes: PS3.4 Table B.5-1."""

from __future__ import annotations

_STORAGE = "1.2.840.10008.5.1.4.1.1."
SECONDARY_CAPTURE: frozenset[str] = frozenset(_STORAGE + suffix for suffix in ("7", "7.1", "7.2", "7.3", "7.4"))
"""Secondary Capture Image (PS3.3 A.8): single-frame, and multi-frame of 1, 8, 16 bits and colour."""

ULTRASOUND: frozenset[str] = frozenset(_STORAGE + suffix for suffix in ("3", "3.1", "6", "6.1", "6.2"))
"""Ultrasound, single-frame, multi-frame, volume, and the retired ones: patient and site stand in the picture."""

IMAGE_CLASSES: frozenset[str] = (
    SECONDARY_CAPTURE
    | ULTRASOUND
    | frozenset(
        _STORAGE + suffix
        for suffix in (
            "1",  # Computed Radiography
            "1.1",  # Digital X-Ray, for presentation
            "1.1.1",  # Digital X-Ray, for processing
            "1.2",  # Digital Mammography, for presentation
            "1.2.1",
            "1.3",  # Intra-oral, for presentation
            "1.3.1",
            "2",  # CT
            "2.1",  # Enhanced CT
            "2.2",  # Legacy Converted Enhanced CT
            "4",  # MR
            "4.1",  # Enhanced MR
            "4.4",  # Legacy Converted Enhanced MR
            "5",  # Nuclear Medicine, retired
            "12.1",  # X-Ray Angiographic
            "12.1.1",  # Enhanced XA
            "12.2",  # X-Ray Radiofluoroscopic
            "12.2.1",  # Enhanced XRF
            "13.1.1",  # X-Ray 3D Angiographic
            "13.1.2",  # X-Ray 3D Craniofacial
            "13.1.3",  # Breast Tomosynthesis
            "20",  # Nuclear Medicine
            "77.1.1",  # VL Endoscopic
            "77.1.4",  # VL Photographic
            "77.1.5.1",  # Ophthalmic Photography 8 bit
            "77.1.5.2",
            "128",  # Positron Emission Tomography
            "128.1",  # Legacy Converted Enhanced PET
            "130",  # Enhanced PET
            "481.1",  # RT Image
        )
    )
)
"""Classes whose frames are pictures of a patient; tiles of whole slides, segmentations and maps are not."""
