"""Records -> plot data -> figure, as pairs: `*_data` makes a table, `*_figure` draws it as SVG.

`*_figures` gives one SVG a panel, so that small multiples can flow on a narrow screen, and
`*_reading` says in one sentence what the numbers show. The modules:

- `cost`: samples seen against a full search, and what every way of ending trials saved
- `ladder`: what became of the trials on each rung, and their learning curves
- `ranks`: agreement of the order of trials between rungs
- `space`: parallel coordinates and slices of the search space
- `importance`: hyperparameter importance by permutation
- `flatness`: tier 2 against tier 1
- `scores`: scores, contributions, ablation, verification
- `training`, `confusion`, `calibration`: full trainings and what they say about the test images
- `comparison`: several studies side by side
"""
