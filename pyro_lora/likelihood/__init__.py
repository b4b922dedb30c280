"""What the observed site of a user's model says.

In come the model, weights and a batch. ``batch`` is the door by which batches come in;
``model_trace`` runs the model at given weights and finds its parts; ``data_plate`` is
the data's dim and scale; ``outcomes`` says which single outcomes there are and which of
them count; ``outcome_source`` which of the model's arguments they come from.
"""
