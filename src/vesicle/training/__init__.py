"""Training: text to tokens, objectives, and the loop that trains a modulator on a frozen model."""
