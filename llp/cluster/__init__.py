"""The only room that talks to Ray.

`ray_tune` runs jobs, `searchers` are Optuna through Tune; `jobs` talks to the job server of a
cluster, with `access`, `submission` and `following`.
"""
