"""One training loop over any iterable of batches; Ray only in `distributed`."""
