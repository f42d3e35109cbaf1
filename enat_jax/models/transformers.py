"""TODO."""

from enat_jax.models import enat, nat

MODELS = {"enat": enat.ENAT, "nat": nat.NAT}
