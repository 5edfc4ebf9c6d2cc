"""Results on their way back: DICOM objects, and the archives that take them."""
