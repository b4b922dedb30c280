"""Posterior -> predictions and their quality."""
