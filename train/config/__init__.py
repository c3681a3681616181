"""What a run is, as frozen dataclasses: schema, presets, and their form on disk and in a shell."""
