"""What a posterior is, and each kind of it.

In comes what an engine has found, or nothing but weight sets; out goes a value that
knows its model, its networks and its prior, and no engine. ``posterior.py`` says what
every posterior has. A Gaussian around a mode, the same made narrower, a Gaussian whose
form is said, particles (an ensemble, one mode), a mixture, MC dropout and any Pyro
guide are the kinds, a file each. One more kind is a class with the
members of :class:`~pyro_lora.posteriors.posterior.Posterior`, in a file of its own, and
a row of ``tests/posteriors/test_protocol.py``; to be saved it needs a description and
an entry in the table of ``export/posterior_state.py``.
"""
