"""Where objects come from: folders and S3 prefixes."""
