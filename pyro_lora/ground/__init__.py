"""What every room stands on, and none of it knows of networks or posteriors.

Checks of settings and of weight sets, warnings that point at the user's line, blocks
that put everything back also when Ctrl-C comes in between, folders of named tensors
that survive a kill, and what several processes own and sum together. Nothing here
imports another room.
"""
