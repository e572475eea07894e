"""Searches on tabulated learning curves: the real decision code on a virtual clock.

tasks (tables as tasks), clock (workers, time, cost), own (our schedulers through the driver's own
code), peers (Ray Tune's schedulers and Optuna's pruners), study (many searches, side by side),
outcome (regret against cost, tables and pictures).
"""
