"""Surfaces of structures, and the distances between them."""
