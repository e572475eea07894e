"""Tier 2: measurements of the loss landscape around a checkpoint, and the gain of refining it."""
