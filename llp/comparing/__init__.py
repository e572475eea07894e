"""Comparing finished trainings: pure functions on one table with a row a training.

- `table`: a ledger of a batch as that table, and the parquet file
- `summary`: mean and standard error of every configuration, heat maps, cost against accuracy
- `significance`: paired tests over seeds, Holm's correction
- `convergence`: how long a training takes to 90, 95 and 99 % of the best

A *configuration* is one way to train, told apart by `label`; its rows differ in `seed` (and in
`repeat`, for trainings that were done again with the very same seed).
"""
