"""The artifact: integer codes, scales and a small header in one file that is counted against the cap."""

from golf_jax.artifact.codecs import ArtifactError
from golf_jax.artifact.container import pack, unpack

__all__ = ["ArtifactError", "pack", "unpack"]
