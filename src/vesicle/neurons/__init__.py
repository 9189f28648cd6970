"""A kit that looks inside: what single neurons, levels and decisions do, each with its control.

`hooks` reads and edits a model's activations by name; each other module or folder is one analysis.
"""
