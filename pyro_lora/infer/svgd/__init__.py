"""Particles that repel one another: model and batches -> K weight sets, a posterior.

``svgd`` is the engine: settings, steps, runs, and what goes on from them
(``training_state``). It asks the kernel's space for a direction:
``weight_space`` (all weights or each site's, with both transports), ``delta_space``
(LoRA's updates) or ``function_space`` (predictions). The space runs
the user's model at all particles (``particle_model``) and compares them by one of the
``kernels``. A plain step goes through ``svgd``, ``particle_model``, ``weight_space``
and ``kernels``.

One more kernel is a frozen value in ``kernels``; one more space a file with a frozen
value that has the members of ``weight_space.Space``, a word in ``kernels.SpaceName``
and a line in ``svgd.SPACES``; one more transport a value as ``weight_space.Transport``
with a line in ``svgd.TRANSPORTS``; a schedule any function of the fraction of a run.
"""
