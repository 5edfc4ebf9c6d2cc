"""Delta tables on local disk and S3: storage, tables, splits, streaming."""
