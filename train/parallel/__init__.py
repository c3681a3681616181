"""Devices in a mesh, processes that train together, and signals to stop."""
