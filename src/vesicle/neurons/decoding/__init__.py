"""Neurons as words: what a neuron's weights say in the terms of the LM head."""
