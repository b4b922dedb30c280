"""Particles that repel one another.

In come a model, a kernel over a space, an optimiser; out comes a posterior of
particles.
"""
