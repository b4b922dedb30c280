"""Observed site -> Fisher information -> precision of the lifted sites.

In come a model's observed sites and the mode. ``fisher`` makes scalars whose gradients
are a root of the Fisher information; ``capture`` records each layer's inputs and the
gradients of its outputs, ``layout`` says which of their rows belong to which datum; a
structure turns both into factors, which ``fit`` sums over the data; out comes a
Gaussian (``block_gaussian``, ``dense_gaussian``, ``dual_gaussian``, of which
``linear_model`` finds the mode and ``inducing`` takes more rows than fit).
``linearize`` pushes that Gaussian through the network's Jacobian to Gaussian logits,
and ``integrals`` to probabilities.

One more structure: a frozen value, of a subclass of ``LayerStructure`` or
``JointStructure`` in ``structures``, and factors of its own, if it has some, of
``SummedFactors`` in ``factors``; yours may live in a file of your own.
"""
