"""Scripts that print the tables the README quotes; run them as modules from the clone."""
