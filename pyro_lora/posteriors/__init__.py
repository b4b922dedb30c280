"""What a posterior is, and each kind of it: Gaussian, particles, mixtures, dropout.

A posterior is a Pyro guide. It knows the model and the networks that it is of, and no
engine that made it.
"""
