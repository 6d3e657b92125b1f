"use strict";
// Building elements, and how numbers are written. Text from the data only ever becomes a text node. Needs nothing.

/** An element; attributes starting with "on" are listeners, booleans become present or absent attributes. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A labelled drop-down. options: [value, label] pairs. */
function select(label, options, chosen, onChange) {
  const element = h("select", { "data-focus": label, onchange: (event) => onChange(event.target.value) },
    options.map(([value, text]) => h("option", { value, selected: String(value) === String(chosen) }, text)));
  return h("label", { class: "field" }, h("span", {}, label), element);
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return String(value).replace("-", "−");
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en").replace("-", "−");
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e5) ? value.toExponential(2) : value.toFixed(size < 0.1 ? digits + 1 : digits);
  return text.replace("-", "−");
}

function percent(value) {
  if (value === null || value === undefined) return "–";
  const text = 100 * value;
  return `${text !== 0 && text < 0.1 ? text.toFixed(3) : text.toFixed(1)} %`;
}

function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

/** A table of rows; the first cell of each is its header. */
function table(columns, rows, caption = null) {
  return h("div", { class: "scroll" }, h("table", {},
    caption === null ? null : h("caption", {}, caption),
    h("thead", {}, h("tr", {}, columns.map((column) => h("th", { scope: "col" }, column)))),
    h("tbody", {}, rows.map(([first, ...cells]) =>
      h("tr", {}, h("th", { scope: "row" }, first), cells.map((cell) => h("td", {}, cell)))))));
}
