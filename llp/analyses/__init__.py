"""What `llp landscape` computes: one file an analysis, over the functions of `llp.landscape`.

Words: the *subject* is the network whose landscape is looked at, with its data and its training as
far as they are known. An *analysis* (a row of `registry.ANALYSES`) consists of *parts* that are
computed, stored and computed again on their own: one surface, one sharpness measure. A part gives a
*finding*: numbers, arrays and tables under documented keys. The main path is in `llp.analysis`.
"""
