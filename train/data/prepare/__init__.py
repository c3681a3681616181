"""Source files to documents, and documents to token files."""
