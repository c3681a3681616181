"""The command line: `python -m train`, its commands and their flags."""
