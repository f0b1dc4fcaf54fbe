"""Sub-commands: each module has ``add_arguments(parser)``, ``run(args)`` and ``EXAMPLES``; its docstring is its help.

One that a grid can run also has ``request(args)``, which checks the arguments and returns what a run would be, and may
have ``name_parts(values)`` for the names of runs.
"""

PHASES = {
    "toy": "A: does an SVD or energy signal beat random choice, on matrices whose structure is known",
    "inspect": "B: do the weights of a model concentrate, and which cheap predictor ranks channels best",
    "prune": "C: warm up a LoRA, prune its rank channels or gate them by token, train on",
}
"""The phases that also have a script of their own in a checkout."""
COMMANDS = {
    "rank": "the least rank each layer of a model, or each module of an adapter, needs",
    "savings": "what LoRA saves in parameters, gradients and optimizer state",
    "profile": "before training: what each sparse layer costs, in every mode, and a schedule",
    "frontier": "which shortcut pays on a model and data, against dense for the same time, in a budget",
    "train": "fine-tune a LoRA, dense or with contextual sparsity, from a YAML file",
    "bench": "does contextual sparsity pay here: step times, FLOPs, quality of the estimates",
    "sensitivity": "how the loss rises with one layer sparse, and layer sparsities for a FLOP budget",
    "eval": "GSM8K exact match, held-out loss or accuracy of a model, with an adapter or alone",
    "edit": "a LoRA adapter with its spectrum rescaled by what the loss reacts to, and whether that helps",
    "reduce": "a smaller adapter: every module's update cut to a lower rank",
    "merge": "an adapter merged into the weights of its base model, file by file",
    "grid": "run a command once for each line of a file, restartable, over GPUs or processes",
    "smoke_test": "the mathematics of editing and one tiny edit, without GPU or network, in seconds",
    "compare": "tables, paired tests and figures from the results of a sweep",
}
IN_GRIDS = (
    "toy", "inspect", "prune", "rank", "savings", "profile", "frontier", "train", "bench", "sensitivity", "eval",
    "edit", "reduce", "merge", "compare",
)  # fmt: skip
"""The commands that a grid can run."""
