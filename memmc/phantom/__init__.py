"""A simulated chest radiography service: thorax phantom, lesions, DICOM writer."""
