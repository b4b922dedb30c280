"""Priors: callables ``f(lora) -> weights`` that call ``pyro.sample`` for every site.

Those here are values with fields, which can be printed, compared and pickled. A
function of your own works the same way: it samples every name in ``lora.sites``, with
all dims of ``lora.zeros()[name]`` as event dims, and returns the values by name.
"""

from pyro_lora.lifting.prior import Prior
from pyro_lora.priors.hierarchical import hierarchical
from pyro_lora.priors.horseshoe import horseshoe
from pyro_lora.priors.independent import laplace, normal, student_t
from pyro_lora.priors.orthogonal import orthogonal
from pyro_lora.priors.previous_posterior import from_posterior
from pyro_lora.priors.rank_ard import rank_ard
from pyro_lora.priors.site_priors import by_site
from pyro_lora.priors.spectral import spectral
from pyro_lora.priors.subspace import subspace

__all__ = [
    "Prior",
    "by_site",
    "from_posterior",
    "hierarchical",
    "horseshoe",
    "laplace",
    "normal",
    "orthogonal",
    "rank_ard",
    "spectral",
    "student_t",
    "subspace",
]
