"""Calibrators on folders: where the cases are, what is drawn from them, and what is fitted, applied and checked."""
