// Draws the line charts of the last minutes, and the small charts in the tiles.

import { amount, clockTime, html, svg, unit } from "./dom.js";

const LEFT = 62,
  BOTTOM = 18,
  TOP = 8,
  RIGHT = 6;

function path(points, x, y) {
  let drawn = "",
    pen = "M";
  points.forEach((point, index) => {
    if (point === null || point === undefined) {
      pen = "M";
      return;
    }
    drawn += `${pen}${x(index).toFixed(1)} ${y(point).toFixed(1)}`;
    pen = "L";
  });
  return drawn;
}

function ceiling(value) {
  if (value <= 0) return 1;
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * scale).find((step) => step >= value);
}

// lines: [{name, kind, points, unit}], of one length; times: Unix seconds of the points.
export function chart(place, lines, times, of, label) {
  const width = Math.max(place.clientWidth / unit(), 200),
    height = Math.round(Math.min(240, Math.max(130, width * 0.36)));
  const top = ceiling(
    Math.max(0, ...lines.flatMap((line) => line.points.filter((point) => point !== null))),
  );
  const right = width - RIGHT,
    bottom = height - BOTTOM,
    steps = Math.max(1, times.length - 1);
  const x = (index) => LEFT + ((right - LEFT) * index) / steps;
  const y = (value) => bottom - ((bottom - TOP) * value) / top;
  const known = lines.some((line) => line.points.some((point) => point !== null));
  const said = lines.map((line) => {
    const last = line.points.findLast((point) => point !== null);
    return `${line.name} ${last === undefined ? "unknown" : `${amount(last)} ${of}`}`;
  });
  const drawing = svg("svg", {
    class: "chart",
    viewBox: `0 0 ${width} ${height}`,
    height: height * unit(),
    role: "img",
    "aria-label": `${label}: ${said.join(", ")}`,
  });
  for (const share of [0, 0.5, 1]) {
    const at = y(top * share);
    drawing.append(svg("line", { class: "grid-line", x1: LEFT, x2: right, y1: at, y2: at }));
    if (known)
      drawing.append(
        svg("text", { x: LEFT - 7, y: at + 4, "text-anchor": "end" }, `${amount(top * share)} ${of}`),
      );
  }
  if (times.length > 1) {
    drawing.append(svg("text", { x: LEFT, y: height - 3 }, clockTime(times[0])));
    drawing.append(
      svg("text", { x: right, y: height - 3, "text-anchor": "end" }, clockTime(times.at(-1))),
    );
  }
  if (!known)
    drawing.append(
      svg(
        "text",
        { x: (LEFT + right) / 2, y: (TOP + bottom) / 2 - 4, "text-anchor": "middle" },
        "no data in the last minutes",
      ),
    );
  for (const line of lines) {
    drawing.append(svg("path", { class: line.kind, d: path(line.points, x, y) }));
    // A value between two missing values has no line, so it gets a dot.
    line.points.forEach((point, index) => {
      if (
        point !== null &&
        (line.points[index - 1] ?? null) === null &&
        (line.points[index + 1] ?? null) === null
      ) {
        drawing.append(
          svg("circle", { class: `${line.kind}-dot`, cx: x(index), cy: y(point), r: 2.5 }),
        );
      }
    });
  }
  const legend = html(
    "p",
    { class: "chart-legend" },
    ...lines.map((line) => {
      const last = line.points.findLast((point) => point !== null);
      return html(
        "span",
        {},
        html("i", { class: `swatch ${line.kind}` }),
        `${line.name} `,
        html("b", {}, last === undefined ? "–" : `${amount(last)} ${of}`),
      );
    }),
  );
  place.replaceChildren(drawing, legend);
}

export function spark(points) {
  const width = 100,
    height = 24,
    top = Math.max(1e-9, ...points);
  const x = (index) => (width * index) / Math.max(1, points.length - 1);
  const y = (value) => height - 2 - ((height - 4) * value) / top;
  const line = path(points, x, y);
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    line
      ? svg("path", { class: "spark-fill", d: `${line}L${width} ${height}L0 ${height}Z` })
      : null,
    line ? svg("path", { class: "spark", d: line }) : null,
  );
}
