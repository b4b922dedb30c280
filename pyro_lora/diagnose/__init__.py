"""Posterior and batches -> verdicts: what to believe of the posterior."""
