"""The only room that talks to Ray: `ray_tune` runs jobs, `searchers` are Optuna through Tune."""
