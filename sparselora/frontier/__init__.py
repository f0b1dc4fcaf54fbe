"""The command `frontier`: which shortcut of the training step pays on this model and data.

The search times candidates and trains pilots of them; `verdict` compares each with dense training for the same wall
clock and says what to train with.

request         settings of a search, frozen
candidates      the ways to train that are tried, and why others are not
profile_levels  sparsities that a finished profile leaves open
plan            pilot runs that fit a budget: successive halving
step_seconds    times of the candidates' steps, interleaved, on real rows
measured_plan   step times and the plan that follows from them, before anything is written
pilots          pilot runs by the one training path
pilot_pool      several of them at a time, in processes of their own, on one GPU or several
device_memory   what is given back between one candidate and the next
pilot_log       finished pilot runs, on file as soon as each has ended
halving         candidates that go on to the next rung
learning_rates  the best of three for all that run in the last rung
search          the whole search, from a request to the files of its folder
pilot_results   finished pilots as its files have them, and the lengths of dense among them
equal_time      dense for the same time: interpolation between dense pilots, and differences to it
frontier_table  a row a candidate, with intervals, tests and the Pareto line
choice          the fastest candidate that pays
verdict         table, page, figure and configuration, written after every rung
"""
