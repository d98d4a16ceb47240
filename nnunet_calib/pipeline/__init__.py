"""Prediction with scores, calibrated probabilities and maps in one pass, and the validation of a trained model."""
