"""The transformers by the name that a config gives them."""

from enat_jax.models import enat, nat

Transformer = enat.ENAT | nat.NAT

MODELS: dict[str, type[enat.ENAT] | type[nat.NAT]] = {"enat": enat.ENAT, "nat": nat.NAT}
