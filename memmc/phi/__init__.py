"""Search for identifying values in everything the pipeline leaves behind."""
