"""golf_jax: Parameter Golf in JAX. Train, pack and score language models of at most 16,000,000 bytes."""
