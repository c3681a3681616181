"""Records out of files, and token files out of records."""
