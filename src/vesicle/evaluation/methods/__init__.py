"""Who decides: the learnt modulator, its controls at equal executed cost, and the oracle."""
