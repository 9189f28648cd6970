"""Measuring a modulator beside its controls, at equal executed cost."""
