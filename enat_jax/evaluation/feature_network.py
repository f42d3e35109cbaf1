"""A network that turns images into features, on all devices of a process."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float, PyTree, UInt8

from enat_jax.runtime import numerics, sharding

BATCH_SIZE = 32  # images on a device at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """A network with its weights, to be called with images.

    Attributes:
        kind: "inception", "trained", "random" or "exported".
        description: JSON values, the same if and only if features may be compared. ``label`` is
            what a distance between means and covariances of "pool" is to be called; ``fingerprint``
            the SHA-256 of the weights, or of the exported function.
        names: of what it gives, see ``__call__``.
        apply: (params, uint8 images ``[b, h, w, c]``) -> float32 arrays ``[b, ...]`` by name; pure.
        params: of numpy arrays.
        image_shape: height, width and channels that it takes, None for any.
        batch_size: images on a device at a time.
        origin: JSON values that say where the weights come from; features do not depend on it.
    """

    kind: str
    description: dict[str, Any]
    names: tuple[str, ...]
    apply: Callable[[Any, jax.Array], dict[str, jax.Array]]
    params: PyTree
    image_shape: tuple[int | None, int | None, int | None]
    batch_size: int = BATCH_SIZE
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    _placed: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def is_inception(self) -> bool:
        """Whether a Fréchet distance of these features may be called FID."""
        return self.kind == "inception"

    def __call__(
        self, images: UInt8[np.ndarray, "b h w c"], mesh: jax.sharding.Mesh | None = None
    ) -> dict[str, Float[np.ndarray, "b d"]]:
        """Computes features of any number of images, on this process's devices.

        Every device computes batches of one size, the last of them filled up, so that features do
        not depend on how many devices there are.

        Args:
            images: of ``image_shape``.
            mesh: whose devices compute; None: all of this process.

        Returns:
            float32: always "pool"; of Inception also "spatial" ``[b, 2023]`` and "probabilities"
            ``[b, 1008]``.

        Raises:
            ValueError: if images are not of ``image_shape``.
        """
        images = self._checked(images)
        local = jax.local_devices() if mesh is None else mesh.local_devices
        mesh, params, run = self._on(tuple(local))
        size = self.batch_size * mesh.size
        parts: list[dict[str, np.ndarray]] = []
        under_way = None
        for start in range(0, max(len(images), 1), size):
            part = images[start : start + size]
            filling = np.zeros((size - len(part), *images.shape[1:]), np.uint8)
            found = run(params, sharding.place(np.concatenate([part, filling]), mesh))
            # One batch is computed while the results of the one before are fetched.
            if under_way is not None:
                parts.append(sharding.to_host(under_way))
            under_way = found
        parts.append(sharding.to_host(under_way))
        return {
            name: np.concatenate([part[name] for part in parts])[: len(images)]
            for name in self.names
        }

    def _checked(self, images: np.ndarray) -> UInt8[np.ndarray, "b h w c"]:
        """Returns the images; raises ValueError for others than ``image_shape`` says."""
        images = np.asarray(images)
        if self.image_shape[2] == 3 and images.shape[3:] == (1,):  # as the networks of any channels
            images = np.repeat(images, 3, axis=3)
        fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3)
        for size, needed in zip(images.shape[1:], self.image_shape, strict=False):
            fits &= needed in (None, size) and size > 0
        if not fits:
            shape = " x ".join("any" if size is None else str(size) for size in self.image_shape)
            raise ValueError(
                f"images of {images.dtype} {images.shape[1:]} do not suit {self.kind} features, "
                f"which take uint8 images of height x width x channels {shape}, grey or RGB"
            )
        return images

    def _on(self, devices: tuple[jax.Device, ...]) -> tuple[jax.sharding.Mesh, Any, Callable]:
        """Returns a mesh of these devices, parameters on each of them, and the compiled network."""
        if devices not in self._placed:
            mesh = sharding.make_mesh(sharding.Sharding(), devices)
            # The same program on every device, which sends nothing to the others.
            run = jax.shard_map(
                self._selected,
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec(sharding.BATCH)),
                out_specs=PartitionSpec(sharding.BATCH),
                check_vma=False,  # not known of exported functions
            )
            params = jax.device_put(self.params, sharding.replicated(mesh))
            self._placed[devices] = mesh, params, numerics.jit(run)
        return self._placed[devices]

    def _selected(self, params: PyTree, images: jax.Array) -> dict[str, jax.Array]:
        found = self.apply(params, images)
        return {name: found[name] for name in self.names}
