"""The atlas: a page with the cards of all neurons, and a summary of them.

`overview` counts by layer, `plots` draws that, `arrays` packs what the page holds, `page` joins it
with `search.js` (what can be found; knows no browser) and `view.js` (what is shown).
"""

from vesicle.neurons.atlas.page import page
from vesicle.neurons.atlas.summary import summary

__all__ = ["page", "summary"]
