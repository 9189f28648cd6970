TODO-HEAD """Training: text to tokens, the objectives, the loop that trains a modulator on a frozen base model."""
