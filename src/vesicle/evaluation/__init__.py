"""Measuring a modulator beside its controls, at equal executed cost.

In reading order, which is also the order of imports:

- `execution`: who runs an item (the engine, the reference, transformers), and items as token ids;
- `methods`: who decides: names, controls, what they cost, the dial, the oracle;
- `report`: what was found: records, rows, tables, plots, pages;
- `run`: what is asked for, and running it: settings, parts, stores, sessions.
"""
