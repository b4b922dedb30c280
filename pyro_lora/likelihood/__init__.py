"""What the observed site of a user's model says.

In come the model, weights and a batch. ``batch`` is the door by which batches come in;
``model_trace`` runs the model at given weights and finds its parts; ``data_plate`` is
the data's dim and scale; ``outcomes`` takes masks and event dims off, says which single
outcomes there are and which of them count; ``outcome_source`` which of the model's
arguments they come from; ``stacks`` whether it keeps several weight sets apart. Out
comes, from the one table in ``likelihoods``, all that is known of a distribution by its
type: its predictor, the root of its Fisher information, what its outcomes are.

One more distribution: an entry made by ``likelihoods.register``; everything else
follows.
"""
