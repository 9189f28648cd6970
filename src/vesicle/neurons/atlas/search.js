"use strict";

// What can be found on the page, and where it is written down. Knows no browser: it is given facts
// and a function that reads an array by its name.

const NOTHING = { q: "", by: "token", kind: "", whole: "", layer: "", sort: "match", page: "1" };

/** What the part of an address behind `#` or `?` asks for, over what is asked for if nothing is. */
function asked(written) {
  const found = { ...NOTHING };
  // A neuron that there is not is looked for, and not found.
  if (/^[\d.]+$/.test(written)) return { ...found, q: written };
  for (const [name, value] of new URLSearchParams(written)) {
    if (Object.hasOwn(found, name)) found[name] = value;
  }
  return found;
}

/** The same, written down: only what differs. */
function written(wanted) {
  const differs = Object.entries(wanted).filter(([name, value]) => value !== NOTHING[name]);
  return new URLSearchParams(differs).toString();
}

/** A typed array from its numbers in base64. */
function decoded(text, Type) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Type(bytes.buffer);
}

class Atlas {
  /** Facts as the page has them; `read` gives an array by its name. */
  constructor(facts, read) {
    this.facts = facts;
    this.count = facts.layers * facts.width;
    this.read = read;
    this.kept = new Map();
  }

  array(name) {
    return this.once(name, () => this.read(name));
  }

  once(name, make) {
    if (!this.kept.has(name)) this.kept.set(name, make());
    return this.kept.get(name);
  }

  /** A neuron's number among all, as `12.345` is written; null if there is none. */
  number(text) {
    const found = /^\s*(\d{1,9})\.(\d{1,9})\s*$/.exec(text);
    if (!found) return null;
    const layer = Number(found[1]);
    const index = Number(found[2]);
    const there = layer < this.facts.layers && index < this.facts.width;
    return there ? layer * this.facts.width + index : null;
  }

  name(neuron) {
    return `${this.layer(neuron)}.${neuron % this.facts.width}`;
  }

  layer(neuron) {
    return Math.floor(neuron / this.facts.width);
  }

  // Tokens that a neuron decodes to ----------------------------------------------------------

  /** Where the direction of a neuron's projection begins in `scores`: + here, - one further. */
  direction(neuron, kind) {
    const { width, kinds } = this.facts;
    const projection = this.layer(neuron) * kinds.length + kinds.indexOf(kind);
    return (projection * width + (neuron % width)) * 2;
  }

  score(neuron, kind) {
    const at = this.direction(neuron, kind);
    const scores = this.array("scores");
    return Math.max(scores[at], scores[at + 1]);
  }

  /** Both ways of a projection, the one with the higher score first. */
  ways(neuron, kind) {
    const { top, tokens } = this.facts;
    const ids = this.array("ids");
    const vocabulary = this.array("vocabulary");
    const ways = ["+", "-"].map((sign, way) => {
      const at = this.direction(neuron, kind) + way;
      const rows = ids.subarray(at * top, (at + 1) * top);
      const likeliest = Array.from(rows, (row) => ({ text: tokens[row], id: vocabulary[row] }));
      return { sign, score: this.array("scores")[at], likeliest };
    });
    return ways[1].score > ways[0].score ? ways.reverse() : ways;
  }

  // Places in the text -----------------------------------------------------------------------

  /** A neuron's highest places, falling, or its lowest, rising. */
  places(neuron, side) {
    const n = this.facts.contexts;
    const part = (name) => this.array(name).subarray(neuron * n, (neuron + 1) * n);
    const values = part(side);
    return Array.from(part(`${side}_places`), (place, i) => ({ place, value: values[i] }));
  }

  /** Both sides, the one of the larger activations first. */
  sides(neuron) {
    const sum = (side) => this.places(neuron, side).reduce((all, one) => all + one.value, 0);
    return sum("high") + sum("low") < 0 ? ["low", "high"] : ["high", "low"];
  }

  /** The tokens around a place, with the neuron's activations there where they are known. */
  strip(neuron, place) {
    const { length, around, strings } = this.facts;
    const text = this.array("text");
    const start = place - (place % length);
    const known = new Map();
    for (const side of ["high", "low"]) {
      for (const one of this.places(neuron, side)) known.set(one.place, one.value);
    }
    const found = [];
    const first = Math.max(start, place - around);
    for (let i = first; i <= Math.min(start + length - 1, place + around); i++) {
      found.push({ text: strings[text[i]], value: known.get(i), here: i === place });
    }
    return found;
  }

  // What drives a transmitter ----------------------------------------------------------------

  drives(neuron) {
    return this.facts.transmitters.map((name, row) => {
      const own = this.array("size")[row * this.count + neuron];
      const sizes = this.sizes(row);
      // The first in rising order that is larger: as many as stand behind it are.
      let low = 0;
      let high = sizes.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (sizes[middle] > own) high = middle;
        else low = middle + 1;
      }
      const drive = this.array("drive")[row * this.count + neuron];
      return { name, drive, size: own, rank: 1 + sizes.length - low };
    });
  }

  /** A transmitter's sizes, rising. */
  sizes(row) {
    const all = () => this.array("size").slice(row * this.count, (row + 1) * this.count).sort();
    return this.once(`sizes of ${row}`, all);
  }

  // Searching --------------------------------------------------------------------------------

  /** Numbers of the neurons that are asked for, in the order that is asked for. */
  find(wanted) {
    const match = this.matches(wanted);
    const { width, layers } = this.facts;
    const layer = /^\d+$/.test(wanted.layer) ? Number(wanted.layer) : null;
    const first = layer === null ? 0 : layer * width;
    const stop = layer === null ? layers * width : Math.min(first + width, this.count);
    const found = [];
    for (let i = first; i < stop; i++) if (!match || match[i] > -Infinity) found.push(i);
    const key = this.key(wanted.sort, match);
    // Sorting is stable: of equals the lower number comes first.
    return key ? found.sort((a, b) => key(b) - key(a)) : found;
  }

  /** By neuron how well it fits, minus infinity where it does not; null if nothing is asked. */
  matches({ q, by, kind, whole }) {
    if (!q.trim()) return null;
    if (by === "high" || by === "low") return this.matchesText(q, whole, by);
    return this.matchesToken(q, kind, whole);
  }

  /** By the place of the first token that fits, then by the direction's score. */
  matchesToken(q, kind, whole) {
    const { top, kinds, tokens } = this.facts;
    const sought = lower(whole ? q.trim() : q);
    const fits = Uint8Array.from(tokens, (text) =>
      whole ? lower(text).trim() === sought : lower(text).includes(sought),
    );
    const match = new Float64Array(this.count).fill(-Infinity);
    const ids = this.array("ids");
    const scores = this.array("scores");
    for (const one of kinds.includes(kind) ? [kind] : kinds) {
      for (let neuron = 0; neuron < this.count; neuron++) {
        const start = this.direction(neuron, one);
        for (let at = start; at < start + 2; at++) {
          for (let rank = 0; rank < top; rank++) {
            if (!fits[ids[at * top + rank]]) continue;
            // No score comes near a thousand.
            match[neuron] = Math.max(match[neuron], scores[at] - 1000 * rank);
            break;
          }
        }
      }
    }
    return match;
  }

  /** By how many of a side's places lie on the text that is sought, then by the extreme. */
  matchesText(q, whole, side) {
    const fits = this.placesOf(whole ? q.trim() : q, whole);
    const match = new Float64Array(this.count).fill(-Infinity);
    const n = this.facts.contexts;
    const places = this.array(`${side}_places`);
    const values = this.array(side);
    for (let neuron = 0; neuron < this.count; neuron++) {
      let hits = 0;
      for (let i = neuron * n; i < (neuron + 1) * n; i++) hits += fits[places[i]];
      const extreme = side === "low" ? -values[neuron * n] : values[neuron * n];
      // The fraction rises with the extreme and stays below 1.
      if (hits) match[neuron] = hits + 0.5 + Math.atan(extreme) / Math.PI;
    }
    return match;
  }

  /** By token of the text whether it lies on an occurrence. */
  placesOf(q, whole) {
    const { joined, starts } = this.once("joined", () => this.joinedText());
    const fits = new Uint8Array(starts.length - 1);
    const sought = lower(q);
    const letter = /[\p{L}\p{N}_]/u;
    for (let at = joined.indexOf(sought); at >= 0; at = joined.indexOf(sought, at + 1)) {
      const end = at + sought.length;
      const before = at > 0 && letter.test(joined[at - 1]);
      const behind = end < joined.length && letter.test(joined[end]);
      if (whole && (before || behind)) continue;
      // The last token that starts at or before the occurrence.
      let low = 0;
      let high = fits.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (starts[middle] <= at) low = middle;
        else high = middle - 1;
      }
      // Parts of a character have no text, and stand before the token that has it.
      while (low > 0 && starts[low - 1] === starts[low]) low--;
      for (let i = low; i < fits.length && starts[i] < end; i++) fits[i] = 1;
    }
    return fits;
  }

  /** The text in lower case, windows apart, and where each of its tokens starts. */
  joinedText() {
    const { length, strings } = this.facts;
    const small = strings.map(lower);
    const text = this.array("text");
    const starts = new Uint32Array(text.length + 1);
    const parts = [];
    let at = 0;
    for (let i = 0; i < text.length; i++) {
      const own = small[text[i]];
      starts[i] = at;
      parts.push(own);
      at += own.length;
      if (i % length === length - 1) {
        parts.push("\0");
        at += 1;
      }
    }
    starts[text.length] = at;
    return { joined: parts.join(""), starts };
  }

  /** What neurons are sorted by, falling; null for their numbers. */
  key(sort, match) {
    const [what, name] = sort.split(".");
    if (what === "match" && match) return (i) => match[i];
    if (what === "score" && this.facts.kinds.includes(name)) return (i) => this.score(i, name);
    const row = this.facts.transmitters.indexOf(name);
    if (what === "drive" && row >= 0) return (i) => this.array("size")[row * this.count + i];
    if (what === "rare") return (i) => -this.array("share")[i];
    if (what === "maximum") return (i) => this.array("high")[i * this.facts.contexts];
    return null;
  }
}

function lower(text) {
  return text.toLowerCase();
}
