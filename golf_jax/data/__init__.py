"""Data: shards, tokenizers and their byte tables, training orders, corpora. Text -> shards -> batches on devices."""

from golf_jax.data.loader import make_loader
from golf_jax.data.shards import find_shards, load_val_tokens, open_shard, write_shard

__all__ = ["find_shards", "load_val_tokens", "make_loader", "open_shard", "write_shard"]
