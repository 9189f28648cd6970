"use strict";

// What is shown of what is found. All text is set as text, never as HTML.

(() => {
  const AT_ONCE = 30;
  const SHOWN = 3; // contexts of a card in a list
  const types = { Uint16Array, Uint32Array, Float32Array };
  const at = (id) => document.getElementById(id);

  const atlas = new Atlas(JSON.parse(at("facts").textContent), (name) => {
    const held = at(`array-${name}`);
    return decoded(held.textContent, types[held.dataset.type]);
  });

  /** An element with attributes, and children of which strings are text. */
  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const grouped = (count) => count.toLocaleString("en");
  const percent = (value) => `${(100 * value).toPrecision(2)} %`;

  function number(value) {
    const size = Math.abs(value);
    const digits = size && size < 1e-3 ? size.toExponential(1) : size.toPrecision(3);
    return (value < 0 ? "−" : "") + digits;
  }

  /** Text of one token, with what cannot be seen spelt out. */
  function spelt(text) {
    return (
      text
        .replace(/[^\S \n\t]|\p{Cf}/gu, (one) => `\\u{${one.codePointAt(0).toString(16)}}`)
        .replaceAll(" ", "␣")
        .replaceAll("\n", "↵")
        .replaceAll("\t", "⇥") || "·"
    );
  }

  // A card -------------------------------------------------------------------------------------

  function projection(neuron, kind) {
    const rows = atlas.ways(neuron, kind).map((way) => {
      const tokens = way.likeliest.map(({ text, id }) =>
        element("bdi", { class: "token", title: `token ${id}` }, spelt(text)),
      );
      const sign = way.sign === "-" ? "−" : "+";
      const score = element("span", { class: "score" }, `${sign} ${way.score.toFixed(1)}`);
      return element("div", { class: "way" }, score, element("span", {}, ...tokens));
    });
    return element("div", { class: "kind" }, element("dt", {}, kind), element("dd", {}, ...rows));
  }

  function context(neuron, { place, value }, most) {
    const strip = element("span", { class: "strip", dir: "auto" });
    for (const [i, one] of atlas.strip(neuron, place).entries()) {
      const whole = i || one.here ? one.text : one.text.trimStart();
      const text = whole.replaceAll("\n", "↵") || (one.here ? "·" : "");
      const known = one.value !== undefined;
      const shade = known && most > 0 ? Math.abs(one.value) / most : 0;
      const attributes = known
        ? { style: `--k:${shade.toFixed(3)}`, class: one.value < 0 ? "low" : "high" }
        : {};
      if (known) attributes.title = number(one.value);
      strip.append(element(one.here ? "mark" : "span", attributes, text));
    }
    return element("li", {}, element("span", { class: "value" }, number(value)), strip);
  }

  function contexts(neuron, side, from, to) {
    const most = Math.max(...["high", "low"].map((s) => Math.abs(atlas.places(neuron, s)[0].value)));
    const rows = atlas.places(neuron, side).slice(from, to);
    return element("ol", {}, ...rows.map((one) => context(neuron, one, most)));
  }

  function statistics(neuron) {
    const of = (name, i = neuron) => atlas.array(name)[i];
    const first = neuron * atlas.facts.contexts;
    const told = [
      `from ${number(of("low", first))} to ${number(of("high", first))}`,
      `mean ${number(of("mean"))}, deviation ${number(of("deviation"))}`,
      `above half of its maximum at ${percent(of("share"))} of tokens`,
    ];
    for (const { name, drive, size, rank } of atlas.drives(neuron)) {
      const rated = size ? ` (rank ${grouped(rank)} of ${grouped(atlas.count)})` : "";
      told.push(`${name} ${size ? number(drive) : 0}${rated}`);
    }
    return element("p", { class: "statistics" }, told.join(" · "));
  }

  function card(neuron, whole) {
    const name = atlas.name(neuron);
    const link = element("a", { href: `#${name}` }, name);
    const heading = element("h3", {}, link);
    const decodedTo = element("dl", {}, ...atlas.facts.kinds.map((k) => projection(neuron, k)));
    const made = element("article", { "aria-label": `neuron ${name}` }, heading, decodedTo);
    const all = atlas.facts.contexts;
    const [first, second] = atlas.sides(neuron);
    const titled = (side) => element("h4", {}, side === "high" ? "Highest" : "Lowest");
    made.append(statistics(neuron), titled(first));
    made.append(contexts(neuron, first, 0, whole ? all : SHOWN));
    const rest = () => {
      const further = whole || all <= SHOWN ? [] : [contexts(neuron, first, SHOWN, all)];
      return [...further, titled(second), contexts(neuron, second, 0, all)];
    };
    if (whole) {
      made.append(...rest());
      return made;
    }
    const more = element("details", {}, element("summary", {}, "More"));
    // Most are never opened.
    more.addEventListener("toggle", () => more.append(...rest()), { once: true });
    made.append(more);
    return made;
  }

  // The page -----------------------------------------------------------------------------------

  const form = at("search");
  let wanted = asked("");
  let place = "";

  /** What the form asks for, and the form from what is asked for. */
  function given() {
    return asked(new FormData(form));
  }

  function fillForm() {
    for (const field of form.elements) {
      if (field.type === "checkbox") field.checked = wanted[field.name] === field.value;
      else if (field.value !== wanted[field.name]) field.value = wanted[field.name];
    }
    for (const one of document.querySelectorAll("a[data-layer]")) {
      one.classList.toggle("on", one.dataset.layer === wanted.layer);
    }
  }

  const linkTo = (address, text) => element("a", { href: `#${address}` }, text);

  function showOne(neuron) {
    const name = atlas.name(neuron);
    const parts = [linkTo(written({ ...wanted, q: "" }), "List")];
    for (const other of [neuron - 1, neuron + 1]) {
      const there = other >= 0 && other < atlas.count;
      if (there) parts.push(linkTo(atlas.name(other), `Neuron ${atlas.name(other)}`));
    }
    at("cards").replaceChildren(card(neuron, true));
    at("pages").replaceChildren(...parts);
    at("status").textContent = `Neuron ${name}.`;
  }

  function showList() {
    const found = atlas.find(wanted);
    const last = Math.max(1, Math.ceil(found.length / AT_ONCE));
    const page = /^\d+$/.test(wanted.page) ? Math.min(last, Math.max(1, Number(wanted.page))) : 1;
    const first = (page - 1) * AT_ONCE;
    const shown = found.slice(first, first + AT_ONCE);
    const to = (other, text) => linkTo(written({ ...wanted, page: String(other) }), text);
    const parts = [];
    if (page > 1) parts.push(to(1, "First"), to(page - 1, "Previous"));
    if (last > 1) parts.push(`page ${page} of ${grouped(last)}`);
    if (page < last) parts.push(to(page + 1, "Next"));
    at("cards").replaceChildren(...shown.map((one) => card(one, false)));
    at("pages").replaceChildren(...parts);
    at("status").textContent = told(found.length, first, shown.length);
  }

  function told(count, first, shown) {
    const most = atlas.name(atlas.count - 1);
    if (!count) return `No neuron fits. Allowed: a neuron from 0.0 to ${most}, or a text.`;
    if (count === shown) return count === 1 ? "1 neuron." : `${grouped(count)} neurons.`;
    return `${grouped(first + 1)} to ${grouped(first + shown)} of ${grouped(count)} neurons.`;
  }

  /** Show what an address asks for: `12.345`, or a search. */
  function show(address) {
    const named = atlas.number(address);
    if (named === null) {
      wanted = asked(address);
      fillForm();
    }
    const one = named ?? atlas.number(wanted.q);
    if (one === null) showList();
    else showOne(one);
    const before = place;
    place = one === null ? wanted.page : atlas.name(one);
    return place !== before;
  }

  /** Ask for something else, as a step of the history or in the place of the last one. */
  function go(next, step) {
    const address = `#${written(next)}`;
    if (address === (location.hash || "#")) return;
    if (step) location.hash = address;
    else location.replace(address);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go(given(), true);
  });
  form.addEventListener("change", () => go(given(), true));
  let waiting = 0;
  form.elements.q.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => go(given(), false), 250);
  });
  document.addEventListener("click", (event) => {
    const chosen = event.target.closest("a[data-layer]");
    if (!chosen) return;
    event.preventDefault();
    const layer = chosen.dataset.layer === wanted.layer ? "" : chosen.dataset.layer;
    go({ ...wanted, layer, page: "1" }, true);
  });
  window.addEventListener("hashchange", () => {
    clearTimeout(waiting);
    const elsewhere = show(location.hash.slice(1));
    // A link that was followed may be gone, and the focus with it.
    const lost = elsewhere && document.activeElement === document.body;
    at("status").scrollIntoView({ block: lost ? "start" : "nearest" });
    if (lost) at("status").focus({ preventScroll: true });
  });
  // On a narrow screen it would hide the rest.
  at("layers").open = matchMedia("(min-width: 40rem)").matches;
  const address = location.hash.slice(1) || location.search.slice(1);
  show(address);
  if (address) at("status").scrollIntoView();
})();
