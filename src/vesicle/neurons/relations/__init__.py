"""Relation-specific neurons: those that tell a relation's prompts from others' (Liu et al. 2025).

`facts` reads relations, `questions` asks the model, `knowledge` keeps what it knows and splits it,
`statistics` scores neurons and `selection` takes the best, `lesioned` silences them, `answers` and
`properties` compare what is lost then, `published` says what that makes of the claims, `translated`
asks in other languages, and `experiment` does all of it.
"""
