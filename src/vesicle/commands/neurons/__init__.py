"""`vesicle neurons`: what single neurons, levels and decisions do; one command an analysis."""

# As in `vesicle.commands`: each is the function of this name in the module of this name.
SUMMARIES = {
    "report": "Make a card for every neuron of a model, and one page with all of them.",
    "card": "Show the card of one neuron.",
    "decode": "Decode every neuron of a model into tokens, through the LM head.",
    "clamp": "Clamp neurons, and see what becomes of the tokens that they decode to.",
    "lens": "Fit a Jacobian lens, and tell whether it foretells clamps better than none.",
    "basis": "Find the features of layers that interact sparsely, and tell how sparsely.",
    "describe": "Describe what neurons fire at, and judge the descriptions on other contexts.",
    "experts": "Train experts that route by sparsity, and ask what their neurons know.",
    "hnlpu": "Price a Plan in energy, time, area and money on a chip with the model in its metal.",
    "languages": "Find the neurons of languages, silence them, and test what was published of "
    "them.",
    "membership": "Infer which documents a model was trained on, from the probabilities of their "
    "tokens.",
    "probe": "Find the neurons that drive a transmitter, and check them by lesion.",
    "relations": "Find the neurons of relations, silence them, and test what was published of "
    "them.",
}
