"""Metrics: numbers made from outputs, with sums that can be drawn again for intervals."""
