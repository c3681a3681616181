"""What a run needs, from shapes alone: bytes, operations, collectives."""
