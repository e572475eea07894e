"""Self-contained HTML pages made from records.

`html` writes pages, `sections` says what a study's page holds and in which order, and `figures`
turns records into plot data and plot data into inline SVG, as pairs that are tested apart.
"""
