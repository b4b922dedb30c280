"""Posterior -> the world: ArviZ's trees, checkpoints, PEFT adapters, pictures.

One more plot: a function in a file of ``plots``, named in ``plots/__init__.py``.
"""
