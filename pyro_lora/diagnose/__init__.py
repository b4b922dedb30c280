"""Posterior and batches -> verdicts: what to believe of the posterior.

One more question is a frozen value with a verdict in ``diagnosis.py``, and the function
that answers it in ``diagnose.py``.
"""
