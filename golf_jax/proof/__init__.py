"""Proof: what can be verified of a run from what it left behind, its own or another program's."""
