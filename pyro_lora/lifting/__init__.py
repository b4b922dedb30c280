"""PEFT network -> Pyro sample sites.

In comes a network with trainable weights. ``sites`` says which of them are lifted, what
their sites are called and what can't be lifted; ``slots`` are the layers that compute
with weights of their own for each particle; ``binding`` puts weights in place of the
network's, for a call or a block; ``folding`` makes particles parts of the batch;
``trunk`` computes once what is the same for all of them. Out comes a
:class:`~pyro_lora.lifting.lifted_network.LiftedNetwork`, which samples its sites by a
prior and returns the network bound to the values; ``initialization`` says where
inference starts.

One more kind of adapter: its parts' names in ``sites``, and, if it reads them other
than as a layer's weight, a slot in ``slots``. The table of networks in
tests/lifting/liftable* shows what a row needs.
"""
