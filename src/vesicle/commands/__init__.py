"""What each command does: its options, early checks, and calls into the library."""

# Each is the function of this name in the module of this name, and this is how its docstring
# begins. They stand here so that `vesicle --help` need not import ten modules for ten lines.
SUMMARIES = {
    "run": "Answer a prompt within a budget of compute.",
    "train": "Train a modulator for a model, which stays as it is.",
    "calibrate": "Measure which dial position executes which share of the dense FLOPs.",
    "distil": "Distil a small FFN for every layer of a model, by forward passes of it alone.",
    "evolve": "Evolve a NAMM, which decides what the cache keeps, for a model that stays as it is.",
    "kept": "Show what a method that forgets keeps of a text.",
    "eval": "Score tasks under a modulator, controls and baselines, with executed cost beside "
    "quality.",
    "regret": "Score a text under a modulator, every control and an oracle, at equal executed "
    "cost.",
    "oracle": "Search the best pattern of big and small FFNs for each token, and tell how "
    "difficult it is.",
    "bench": "Measure speed side by side: this engine at rest, at a budget, and its rivals.",
    "study": "Run a whole experiment plan: train, judge, ablate, draw, time, and write one report.",
    "neurons": "Look inside a model: what single neurons, levels and decisions do.",
    "models": "List the models that go by a short name, and what the cache holds.",
    "info": "Tell what a modulator is, and what the engine finds on this machine.",
}
GROUPS = ("neurons",)
"""Those that have commands of their own, in a folder."""
