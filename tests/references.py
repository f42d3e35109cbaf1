"""Goldens of the transformer: outputs of the reference implementation on small random models."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.models import conversion, enat

GOLDEN = pathlib.Path(__file__).parent / "golden"
MASK = 1024


class Golden:
    """One golden file: its arrays, and the model and parameters that they belong to."""

    def __init__(self, name):
        self.file = np.load(GOLDEN / f"{name}.npz")
        self.config = json.loads(str(self.file["config"]))
        c = self.config
        self.model = enat.ENAT(
            num_tokens=c["latent_size"] ** 2,
            codebook_size=c["codebook_size"],
            num_classes=c["num_classes"],
            width=c["hidden_size"],
            num_heads=c["num_heads"],
            encoder_layers=c["enc_depth"],
            decoder_layers=c["dec_depth"],
        )
        self.params = conversion.enat_params(self.tensors("param:"), self.model)

    def __getitem__(self, key):
        return self.file[key]

    def tensors(self, prefix):
        """The arrays of a state dict, float32, by the reference's names."""
        names = [k for k in self.file.files if k.startswith(prefix)]
        return {k.removeprefix(prefix): self.file[k].astype(np.float32) for k in names}

    def apply(self, *args, **kwargs):
        return apply(self.model, self.params, *args, **kwargs)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(model, params, *args, **kwargs):
    """``model.apply`` compiled as one; op by op it would take seconds."""
    return model.apply({"params": params}, *args, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def initial(model, seed=0):
    """Initial parameters of a transformer."""
    ids = jnp.zeros((1, model.num_tokens), jnp.int32)
    return model.init(jax.random.key(seed), ids, jnp.zeros((1,), jnp.int32))["params"]


def perturbed(model, seed=0):
    """Random parameters in which, unlike in the initial ones, labels and blocks have a say.

    Drawn with numpy, because compiling an initialisation takes seconds.
    """
    ids, labels = jnp.zeros((1, model.num_tokens), jnp.int32), jnp.zeros((1,), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, labels)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        is_scale = path[-1].key == "scale"
        spread = 0.2 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
        return (is_scale + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def order_of(previous, current):
    """A reveal order in which what ``previous`` shows comes first, then what ``current`` adds.

    Both are int [b, l] inputs of the reference, [MASK] where masked. Returns the order int [b, l]
    and the two visible counts, which are the same for every row.
    """
    rank = np.where(previous != MASK, 0, np.where(current != MASK, 1, 2))
    counts = (rank == 0).sum(axis=1), (rank <= 1).sum(axis=1)
    assert all(len(set(c.tolist())) == 1 for c in counts)
    return np.argsort(rank, axis=1, kind="stable"), int(counts[0][0]), int(counts[1][0])


def rows(raster, order):
    """Rows of a raster-ordered array [b, l, ...] in the order of ``order`` [b, n]."""
    return np.take_along_axis(raster, order.reshape(*order.shape, *[1] * (raster.ndim - 2)), axis=1)
