"""Tier 1 as pure decisions: budgets, promotion, stop rules. numpy and scipy only, no Ray."""
