"""Observed site -> Fisher information -> precision of the lifted sites."""
