"""The methods of others that end in a Gaussian over the weights, a file each.

``blob`` is a guide for SVI, ``IVON`` an optimiser for the network's own training loop,
``swag`` a function of what any optimiser went through, ``tfb`` one of a trained adapter
and some rows. What each gives is a
:class:`~pyro_lora.posteriors.gaussian_posterior.GaussianPosterior`, and so is what
``mean_field`` makes of a trained guide. One more is a function, in a file of its own,
that ends in one.
"""

from pyro_lora.infer.methods.blob import blob
from pyro_lora.infer.methods.ivon import IVON
from pyro_lora.infer.methods.swag import swag
from pyro_lora.infer.methods.tfb import tfb
from pyro_lora.posteriors.gaussian_posterior import GaussianPosterior, mean_field

__all__ = ["IVON", "GaussianPosterior", "blob", "mean_field", "swag", "tfb"]
