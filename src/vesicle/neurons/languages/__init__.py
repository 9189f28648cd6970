"""Language neurons: those that fire in some languages (Tang et al. 2024; Zhang et al. 2025).

`parallel` reads sentences, `entropy` scores and classifies neurons, `parts` divides the layers,
`lesions` and `written` say what silencing them does, `alignment` tunes a model a little on
translations and `compared` sets two checkpoints side by side; `experiment` does all of it.
"""
