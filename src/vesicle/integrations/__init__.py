"""Bridges to other people's programs: the lm-evaluation-harness and NVIDIA's kvpress."""
