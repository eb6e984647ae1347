"""Sampling replies: continuous batching over a paged key/value cache."""

from tooln1.sampler.sampler import Sampler

__all__ = ["Sampler"]
