// Draws the parts of the flow: engines, the router, and the labels of arrows.

import { amount, bytes, counted, html, percent, shownState, svg, tone, why } from "./dom.js";

export function engineText(engine) {
  const reading = engine.reading;
  const parts = [`${engine.name}, ${engine.role ?? "no role"}, ${shownState(engine)}`];
  if (why(engine)) parts.push(why(engine));
  if (reading)
    parts.push(
      `${reading.running} running, ${reading.waiting} waiting, KV cache ${percent(reading.kv_usage)}`,
    );
  return parts.join(", ");
}

export const pairText = (pair) =>
  `${pair.prefill} to ${pair.decode}: ${pair.path}, ${bytes(pair.pulls.bytes_per_s, "/s")}` +
  ((pair.pulls.gigabytes_per_s ?? pair.gigabytes_per_s)
    ? ` at ${amount(pair.pulls.gigabytes_per_s ?? pair.gigabytes_per_s)} GB/s`
    : "") +
  (pair.health === "open" ? ", no pull is begun for a while" : "") +
  (pair.last_failure ? `, last failure: ${pair.last_failure}` : "");

function clip(text, width, size) {
  const most = Math.max(3, Math.floor(width / (size * 0.58)));
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

export function engineBox(engine, at) {
  const { x, y, width, height } = at,
    reading = engine.reading,
    kind = engine.role ?? "both";
  const group = svg("g", {
    class: "engine",
    "data-name": engine.name,
    "data-state": engine.state,
    "data-tone": tone(engine),
    role: "img",
    tabindex: 0,
    "aria-label": engineText(engine),
    transform: `translate(${x} ${y})`,
  });
  group.append(
    svg("title", {}, engineText(engine)),
    svg("rect", { class: "box", width, height, rx: 9 }),
    svg("rect", {
      class: `stripe stripe-${kind}`,
      x: 0,
      y: 8,
      width: 4,
      height: height - 16,
      rx: 2,
    }),
  );
  if (at.small) {
    group.append(
      svg("circle", { class: `tone-${tone(engine)}`, cx: 16, cy: height / 2, r: 4.5 }),
      svg(
        "text",
        { class: "small", x: 26, y: height / 2 + 4 },
        clip(engine.name, width - 34, 11.5),
      ),
      svg("rect", { class: "track", x: 12, y: height - 5, width: width - 20, height: 2 }),
      svg("rect", {
        class: "fill",
        x: 12,
        y: height - 5,
        width: (width - 20) * (reading?.kv_usage ?? 0),
        height: 2,
      }),
    );
    return group;
  }
  const inner = width - 30,
    used = reading?.kv_usage ?? 0,
    tight = width < 230;
  let work = reading
    ? `${reading.running} running · ${reading.waiting} waiting`
    : engine.state === "gone"
      ? "left the deployment"
      : "not read yet";
  if (tight && reading) work = `${reading.running} run · ${reading.waiting} wait`;
  if (tight && shownState(engine) !== "ready") work = shownState(engine);
  group.append(
    svg("circle", { class: `tone-${tone(engine)}`, cx: 21, cy: 20, r: 5 }),
    svg(
      "text",
      { class: "engine-name", x: 33, y: 24.5 },
      clip(engine.name, tight ? inner - 10 : inner * 0.62, 13),
    ),
    tight
      ? ""
      : svg(
          "text",
          { class: `small tone-${tone(engine)}`, x: width - 13, y: 24, "text-anchor": "end" },
          clip(shownState(engine), inner * 0.36, 11.5),
        ),
    svg("text", { class: "small", x: 16, y: 44 }, clip(why(engine) || work, inner, 11.5)),
    svg("text", { class: "small", x: 16, y: 64.5 }, "KV"),
    svg("rect", { class: "track", x: 38, y: 58, width: inner - 66, height: 7, rx: 3.5 }),
    svg("rect", {
      class: used > 0.9 ? "fill full" : "fill",
      x: 38,
      y: 58,
      width: Math.max(0, (inner - 66) * used),
      height: 7,
      rx: 3.5,
    }),
    svg(
      "text",
      { class: "small", x: width - 13, y: 64.5, "text-anchor": "end" },
      reading ? percent(used) : "–",
    ),
  );
  return group;
}

export function routerBox(status, at) {
  const tones = { ok: "ready", unavailable: "down" },
    look = tones[status.state] ?? "busy";
  const label = `router, ${status.state}, ${counted(status.in_flight, "request")} in flight, ${amount(status.rates.requests_per_s)} a second`;
  return svg(
    "g",
    {
      class: "engine",
      "data-tone": look,
      "data-state": status.state,
      role: "img",
      tabindex: 0,
      "aria-label": label,
      transform: `translate(${at.x} ${at.y})`,
    },
    svg("title", {}, label),
    svg("rect", { class: "box", width: at.width, height: at.height, rx: 9 }),
    svg("circle", { class: `tone-${look}`, cx: 18, cy: 20, r: 5 }),
    svg("text", { class: "engine-name", x: 30, y: 24.5 }, "router"),
    svg("text", { class: "small", x: 14, y: 44 }, `${status.in_flight} in flight`),
    svg(
      "text",
      { class: "small", x: 14, y: 62 },
      `${amount(status.rates.requests_per_s)} requests/s`,
    ),
  );
}

function said(pair, kind) {
  const speed = pair.pulls.gigabytes_per_s ?? pair.gigabytes_per_s,
    states = { " broken": "not usable", " idle": "idle" };
  return [
    states[kind] ?? bytes(pair.pulls.bytes_per_s, "/s"),
    `${pair.path}${speed === null ? "" : ` · ${amount(speed)} GB/s`}`,
  ];
}

// Makes a list item for a pair, for pages too narrow for labels beside the arrows.
export const pairItem = (pair, kind) =>
  html(
    "li",
    {},
    html("b", {}, `${pair.prefill} → ${pair.decode}`),
    ` ${said(pair, kind).join(" · ")}`,
  );

const short = (name) => /\d+$/.exec(name)?.[0] ?? name.slice(0, 8);

export function pairLabel(pair, x, y, kind, alone) {
  const [now, second] = said(pair, kind);
  const first = alone ? now : `${short(pair.prefill)} → ${short(pair.decode)}  ${now}`;
  const width = Math.max(first.length * 7.6, second.length * 6.4) + 18;
  return svg(
    "g",
    { "aria-hidden": "true" },
    svg("rect", { class: "tag", x: x - width / 2, y: y - 18, width, height: 36, rx: 7 }),
    svg("text", { x, y: y - 3, "text-anchor": "middle", class: "engine-name" }, first),
    svg("text", { x, y: y + 12, "text-anchor": "middle", class: "small" }, second),
  );
}
