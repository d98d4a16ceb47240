"""A new structure from a few annotated volumes, on top of a trained nnU-Net whose base classes stay as they are."""
