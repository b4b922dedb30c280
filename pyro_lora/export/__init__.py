"""Posterior -> files, ArviZ, PEFT adapters, pictures."""
