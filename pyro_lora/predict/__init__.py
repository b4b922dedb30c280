"""Posterior and batches -> predictions and their quality.

By draws of the weights, or by the linearised network: classes, real numbers, tokens,
generated text, each with what the draws agree and disagree on. One more kind of
prediction is a subclass of ``AnyPrediction`` in a file of its own, and a line where
``sampled.py`` makes those of a likelihood.
"""
