// Draws the route of requests: router, prefill engines, pairs, decode engines.

import { engineBox, pairItem, pairLabel, pairText, routerBox } from "./boxes.js";
import { html, svg, tone, unit } from "./dom.js";

const BOX = 78,
  GAP = 16,
  SMALL = 34,
  MANY = 12,
  MOST_PAIRS = 64,
  NARROW = 620,
  TAG = 40;

const COLUMNS = [
  ["prefill", "PREFILL"],
  ["decode", "DECODE"],
  ["both", "BOTH ROLES"],
];

export function listed(status) {
  const gone = status.gone.map((engine) => ({
    ...engine,
    state: "gone",
    reason: "",
    reading: null,
    load: 0,
  }));
  const known = new Set(status.engines.map((engine) => engine.name));
  const all = [...status.engines, ...gone.filter((engine) => !known.has(engine.name))];
  return all.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
}

// Places boxes in columns (on a narrow page in rows), and returns where arrows end.
function place(groups, width) {
  const narrow = width < NARROW,
    places = new Map(),
    names = [];
  const wireX = narrow ? 0 : Math.min(150, width * 0.15);
  let bottom = 0;
  if (narrow) {
    let y = BOX + 26;
    for (const [role, title] of COLUMNS) {
      const engines = groups.get(role);
      if (!engines.length) continue;
      const small = engines.length > MANY,
        columns = small ? Math.max(2, Math.floor(width / 110)) : Math.min(2, engines.length);
      names.push({ x: 0, y: y + 10, title });
      engines.forEach((engine, index) => {
        const boxWidth = (width - GAP * (columns - 1)) / columns,
          height = small ? SMALL : BOX;
        places.set(engine.name, {
          x: (index % columns) * (boxWidth + GAP),
          y: y + 20 + Math.floor(index / columns) * (height + GAP / 2),
          width: boxWidth,
          height,
          small,
        });
      });
      const rows = Math.ceil(engines.length / columns);
      bottom = y + 20 + rows * ((small ? SMALL : BOX) + GAP / 2);
      y = bottom + (role === "prefill" ? 44 : 18);
    }
    return {
      places,
      names,
      height: bottom + 4,
      narrow,
      router: { x: 0, y: 0, width: Math.min(width, 220), height: BOX - 6 },
    };
  }
  const left = wireX + Math.min(64, width * 0.05),
    room = width - left;
  const boxWidth = Math.min(420, room * 0.34);
  const starts = { prefill: left, decode: width - boxWidth, both: left };
  let tallest = BOX;
  for (const [role, title] of COLUMNS.slice(0, 2)) {
    const engines = groups.get(role);
    if (!engines.length) continue;
    names.push({ x: starts[role], y: 11, title });
    tallest = Math.max(tallest, stack(engines, starts[role], 22, boxWidth, places));
  }
  // Centre the shorter column beside the taller one.
  for (const [role] of COLUMNS.slice(0, 2)) {
    const engines = groups.get(role),
      own = engines.length ? stack(engines, starts[role], 22, boxWidth, new Map()) : 0;
    for (const engine of engines) places.get(engine.name).y += (tallest - own) / 2;
  }
  bottom = groups.get("prefill").length || groups.get("decode").length ? 22 + tallest : 0;
  const both = groups.get("both");
  if (both.length) {
    const y = bottom ? bottom + 24 : 11;
    names.push({ x: left, y, title: "BOTH ROLES" });
    const columns = Math.max(1, Math.floor((room + GAP) / (boxWidth * 0.8 + GAP))),
      each = (room - GAP * (columns - 1)) / columns;
    both.forEach((engine, index) =>
      places.set(engine.name, {
        x: left + (index % columns) * (each + GAP),
        y: y + 11 + Math.floor(index / columns) * (BOX + GAP),
        width: Math.min(each, 330),
        height: BOX,
        small: false,
      }),
    );
    bottom = y + 11 + Math.ceil(both.length / columns) * (BOX + GAP);
  }
  return {
    places,
    names,
    height: bottom + 6,
    narrow,
    router: { x: 0, y: Math.max(0, 22 + (tallest - BOX) / 2), width: wireX, height: BOX },
  };
}

function stack(engines, x, y, width, places) {
  const small = engines.length > MANY,
    columns = small ? Math.max(1, Math.floor(width / 120)) : 1;
  const each = (width - (columns - 1) * 6) / columns,
    step = small ? SMALL + 6 : BOX + GAP;
  engines.forEach((engine, index) =>
    places.set(engine.name, {
      x: x + (index % columns) * (each + 6),
      y: y + Math.floor(index / columns) * step,
      width: each,
      height: small ? SMALL : BOX,
      small,
    }),
  );
  return Math.ceil(engines.length / columns) * step - (small ? 6 : GAP);
}

function curve(from, to, narrow) {
  if (narrow) {
    const x1 = from.x + from.width / 2,
      y1 = from.y + from.height,
      x2 = to.x + to.width / 2,
      y2 = to.y - 8,
      bend = (y2 - y1) / 2;
    return {
      points: [x1, y1, x1, y1 + bend, x2, y2 - bend, x2, y2],
      tip: [
        [x2 - 5, y2 - 1],
        [x2 + 5, y2 - 1],
        [x2, y2 + 8],
      ],
    };
  }
  const x1 = from.x + from.width,
    y1 = from.y + from.height / 2,
    x2 = to.x - 9,
    y2 = to.y + to.height / 2,
    bend = (x2 - x1) / 2;
  return {
    points: [x1, y1, x1 + bend, y1, x2 - bend, y2, x2, y2],
    tip: [
      [x2 - 1, y2 - 5],
      [x2 - 1, y2 + 5],
      [x2 + 9, y2],
    ],
  };
}

const along = (points, t, axis) => {
  const [a, b, c, d] = [0, 2, 4, 6].map((index) => points[index + axis]),
    u = 1 - t;
  return u * u * u * a + 3 * u * u * t * b + 3 * u * t * t * c + t * t * t * d;
};
const drawn = (p) => `M${p[0]} ${p[1]}C${p[2]} ${p[3]} ${p[4]} ${p[5]} ${p[6]} ${p[7]}`;

// Places labels at the middles of their arrows without overlap; returns none if the room is small.
function labels(wanted, height) {
  const room = Math.floor(height / TAG);
  if (wanted.length > room) return [];
  const sorted = wanted.sort((a, b) => a.y - b.y || a.pair.prefill.localeCompare(b.pair.prefill));
  sorted.forEach((label, index) => {
    label.y = Math.max(label.y, index ? sorted[index - 1].y + TAG : TAG / 2);
  });
  let limit = height - TAG / 2;
  for (const label of sorted.toReversed()) {
    label.y = Math.min(label.y, limit);
    limit = label.y - TAG;
  }
  return sorted.map((label) =>
    pairLabel(label.pair, label.x, label.y, label.kind, wanted.length === 1),
  );
}

export function drawFlow(container, status) {
  const scale = unit(),
    width = Math.max(260, container.clientWidth / scale) - 2,
    engines = listed(status);
  const groups = new Map(
    COLUMNS.map(([role]) => [role, engines.filter((engine) => (engine.role ?? "both") === role)]),
  );
  const { places, names, height, narrow, router } = place(groups, width);
  const focused = document.activeElement?.closest?.(".engine")?.dataset.name;
  const drawing = svg("svg", {
    class: "drawing",
    viewBox: `-1 0 ${width + 2} ${height}`,
    height: height * scale,
    role: "group",
    "aria-label": "Engines, and the pairs that KV blocks move over",
  });
  for (const { x, y, title } of names)
    drawing.append(svg("text", { class: "column-name", x, y }, title));
  if (!narrow) {
    for (const engine of [...groups.get("prefill"), ...groups.get("both")]) {
      const wire = curve(router, places.get(engine.name), false).points;
      wire[6] += 9;
      drawing.append(svg("path", { class: "wire", d: drawn(wire) }));
    }
  }
  const states = new Map(engines.map((engine) => [engine.name, tone(engine)]));
  const pairs = status.pairs
    .filter((pair) => places.has(pair.prefill) && places.has(pair.decode))
    .slice(0, MOST_PAIRS);
  const most = Math.max(1, ...pairs.map((pair) => pair.pulls.bytes_per_s)),
    wanted = [];
  for (const pair of pairs) {
    const { points, tip } = curve(places.get(pair.prefill), places.get(pair.decode), narrow);
    const broken =
      pair.health === "open" ||
      states.get(pair.prefill) === "down" ||
      states.get(pair.decode) === "down";
    const kind = broken ? " broken" : pair.pulls.bytes_per_s > 0 ? "" : " idle",
      thick =
        (pairs.length > MANY ? 0.6 : 2) +
        ((pairs.length > MANY ? 1.8 : 6) * pair.pulls.bytes_per_s) / most;
    drawing.append(
      svg(
        "g",
        {
          role: "img",
          "aria-label": pairText(pair),
          "data-pair": `${pair.prefill} ${pair.decode}`,
        },
        svg("title", {}, pairText(pair)),
        svg("path", {
          class: `pair${kind}${pairs.length > MANY ? " many" : ""}`,
          d: drawn(points),
          "stroke-width": broken ? 2 : thick,
        }),
        kind ? null : svg("path", { class: "pair-flow", d: drawn(points) }),
        svg("polygon", {
          class: `pair-tip${kind}`,
          points: tip.map((corner) => corner.join(",")).join(" "),
        }),
      ),
    );
    wanted.push({ pair, kind, x: along(points, 0.5, 0), y: along(points, 0.5, 1) });
  }
  drawing.append(...(narrow ? [] : labels(wanted, height)), routerBox(status, router));
  for (const engine of engines) drawing.append(engineBox(engine, places.get(engine.name)));
  const items = narrow ? wanted.map(({ pair, kind }) => pairItem(pair, kind)) : [];
  container.replaceChildren(drawing, html("ul", { class: "pairs", "aria-hidden": true }, ...items));
  if (focused) container.querySelector(`.engine[data-name="${CSS.escape(focused)}"]`)?.focus();
}
