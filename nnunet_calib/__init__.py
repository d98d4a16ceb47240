"""Calibrated segmentation for nnU-Net. Imports nothing: every interpreter start in the environment runs this file."""

__version__ = "0.1.0"
