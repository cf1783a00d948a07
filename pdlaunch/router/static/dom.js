// Makes elements. Text of the deployment becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on")
      for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const html = (name, attributes = {}, ...children) =>
  fill(document.createElement(name), attributes, children);
export const svg = (name, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, name), attributes, children);
export const byId = (id) => document.getElementById(id);

export function table(caption, headings, rows) {
  const heads = headings.map((heading) =>
    html("th", { scope: "col", class: heading.class }, heading.name),
  );
  return html(
    "table",
    {},
    html("caption", {}, caption),
    html("thead", {}, html("tr", {}, ...heads)),
    html("tbody", {}, ...rows),
  );
}

export function amount(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toPrecision(digits)} G`;
  if (size >= 1e6) return `${(value / 1e6).toPrecision(digits)} M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(digits)} k`;
  if (size >= 100) return value.toFixed(0);
  return String(Number(value.toPrecision(digits)));
}

export function bytes(value, per = "") {
  const [digits, letter = ""] = amount(value).split(" ");
  return digits === "–" ? digits : `${digits} ${letter}B${per}`;
}

export const count = (value) =>
  value === null || value === undefined ? "–" : value.toLocaleString("en-US");

export const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

// Drawings use units that grow with the font, so that a character always has the same size in them.
export const unit = () => parseFloat(getComputedStyle(document.documentElement).fontSize) / 15;

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return value >= 10000 ? `${(value / 1000).toFixed(1)} s` : `${amount(value)} ms`;
}

export const percent = (share) =>
  share === null || share === undefined ? "–" : `${Math.round(share * 100)} %`;
export const clockTime = (at) => new Date(at * 1000).toLocaleTimeString([], { hour12: false });

const HEALTH = { open: "left out", half_open: "on trial" };

// The router may leave out a ready engine, because its requests have failed or are slow.
export function shownState(engine) {
  if (engine.is_down && engine.state !== "failed") return "down";
  return engine.state === "ready" ? (HEALTH[engine.health] ?? "ready") : engine.state;
}
export const why = (engine) => engine.reason || engine.left_out || "";

export function tone(engine) {
  if (shownState(engine) === "ready") return "ready";
  return engine.is_down || engine.state === "gone" ? "down" : "busy";
}
