"""Gradient transformations that averages, clips, regions and blocks are made of."""
