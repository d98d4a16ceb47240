"""Calibration counted: the rules, three ways to fill the statistics with them, and the scores made of those."""
