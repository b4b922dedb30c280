"""Posterior -> verdicts."""
