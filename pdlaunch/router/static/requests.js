// Lists requests, and draws the waterfall of a request: its spans over time.

import { amount, clockTime, html, milliseconds, svg, table } from "./dom.js";

const KINDS = [
  ["queue", "queue"],
  ["prefill", "prefill"],
  ["pull", "pull"],
  ["decode", "decode"],
  ["token", "decode"],
];
const kindOf = (name) => KINDS.find(([part]) => name.includes(part))?.[1] ?? "other";

// A summary has durations but no instants, so its parts are drawn one after the other.
function strip(request) {
  const total = request.total_ms,
    parts = [
      ["queue", request.queue_ms],
      ["prefill", request.prefill_ms],
      ["pull", request.pull_ms],
    ].filter(([, ms]) => ms);
  const picture = svg(
    "svg",
    { class: "strip", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "track", width: 100, height: 10 }),
  );
  if (!total) return picture;
  let at = 0;
  for (const [kind, ms] of parts) {
    const width = Math.min(ms / total, 1 - at);
    picture.append(svg("rect", { class: kind, x: at * 100, width: width * 100, height: 10 }));
    at += width;
  }
  const first = Math.max(at, Math.min(1, (request.first_token_ms ?? total) / total));
  picture.append(
    svg("rect", { class: "decode", x: first * 100, width: (1 - first) * 100, height: 10 }),
  );
  return picture;
}

export function drawRequests(container, requests, chosen, choose) {
  const focused = container.contains(document.activeElement)
    ? document.activeElement.dataset.id
    : undefined;
  const rows = requests.map((request) => {
    const failed = request.error !== null && request.error !== undefined;
    const knowsCached = request.cached_device_tokens !== null;
    const cached = request.cached_device_tokens + request.cached_host_tokens;
    return html(
      "tr",
      { class: request.id === chosen ? "chosen" : "" },
      html("td", {}, clockTime(request.received_at)),
      html(
        "td",
        {},
        html(
          "button",
          {
            type: "button",
            class: "link",
            title: request.id,
            "data-id": request.id,
            "aria-label": `Waterfall of request ${request.id}`,
            on: { click: () => choose(request.id) },
          },
          request.id,
        ),
      ),
      html(
        "td",
        { class: failed ? "tone-down" : "", title: request.error },
        request.status === null ? "running" : String(request.status),
      ),
      html("td", {}, request.route?.replace("->", " → ") ?? "–"),
      html("td", {}, strip(request)),
      html("td", { class: "number" }, amount(request.prompt_tokens)),
      html(
        "td",
        { class: "number hide-narrow" },
        `${amount(knowsCached ? cached : request.cached_tokens)} / ${amount(request.remote_tokens)}`,
      ),
      html("td", { class: "number" }, milliseconds(request.first_token_ms)),
      html("td", { class: "number" }, milliseconds(request.ms_per_token)),
      html("td", { class: "number" }, amount(request.output_tokens)),
      html("td", { class: "number" }, milliseconds(request.total_ms)),
    );
  });
  const number = (name) => ({ name, class: "number" });
  if (!rows.length) {
    container.replaceChildren(html("p", { class: "empty" }, "No request yet."));
    return;
  }
  const list = table(
    "",
    [
      { name: "Time" },
      { name: "Request" },
      { name: "Status" },
      { name: "Engines" },
      { name: "Where its time went" },
      number("Prompt"),
      { name: "Cached / pulled", class: "number hide-narrow" },
      number("First token"),
      number("Per token"),
      number("Tokens"),
      number("Total"),
    ],
    rows,
  );
  list.querySelector("caption").remove();
  container.replaceChildren(list);
  if (focused) container.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
}

const fact = (name, value) =>
  value === null || value === undefined || value === ""
    ? null
    : html("div", {}, html("dt", {}, name), html("dd", {}, value));

export function drawTrace(container, trace, close) {
  const spans = [...trace.spans].sort((a, b) => a.start_ms - b.start_ms || b.end_ms - a.end_ms);
  const end = Math.max(1e-3, trace.total_ms ?? 0, ...spans.map((span) => span.end_ms));
  const rows = spans.map((span) => {
    const start = (span.start_ms / end) * 1000,
      width = Math.max(3, ((span.end_ms - span.start_ms) / end) * 1000);
    const about = Object.entries(span.attributes)
      .map(([name, value]) => `${name} ${value}`)
      .join(", ");
    const words = `${span.name} at ${span.process}: from ${milliseconds(span.start_ms)} for ${milliseconds(span.end_ms - span.start_ms)}${about ? `; ${about}` : ""}`;
    return html(
      "tr",
      { title: words },
      html("th", { scope: "row" }, span.name),
      html("td", { class: "quiet process" }, span.process),
      html("td", { class: "number" }, milliseconds(span.end_ms - span.start_ms)),
      html(
        "td",
        { class: "lane" },
        svg(
          "svg",
          { viewBox: "0 0 1000 20", preserveAspectRatio: "none", role: "img", "aria-label": words },
          svg("rect", { class: "lane-back", width: 1000, height: 20 }),
          svg("rect", {
            class: kindOf(span.name),
            x: Math.min(start, 997),
            y: 3,
            width,
            height: 14,
          }),
        ),
      ),
    );
  });
  // Engines of other kinds report no spans. Show that their part is unknown.
  for (const engine of new Set([trace.prefill, trace.decode])) {
    const tells = (span) => span.process === engine || span.process.startsWith(`${engine}/`);
    if (!engine || spans.some(tells)) continue;
    rows.push(
      html(
        "tr",
        {},
        html("th", { scope: "row" }, "unknown"),
        html("td", { class: "quiet process" }, engine),
        html("td", { class: "number" }, "–"),
        html("td", { class: "lane quiet" }, "This engine reports no spans."),
      ),
    );
  }
  const pull =
    trace.pull_ms === null
      ? null
      : `${milliseconds(trace.pull_ms)}, ${amount(trace.pull_mb)} MB at ${amount(trace.pull_gb_s)} GB/s${trace.verified ? ", verified" : ""}`;
  const waterfall = table(
    "",
    [
      { name: "Span" },
      { name: "Process", class: "process" },
      { name: "Time", class: "number" },
      { name: `0 to ${milliseconds(end)}` },
    ],
    rows,
  );
  waterfall.className = "waterfall";
  waterfall.querySelector("caption").remove();
  container.replaceChildren(
    html(
      "div",
      { class: "trace-head" },
      html("h3", {}, `Waterfall of ${trace.id}`),
      html("button", { type: "button", class: "button", on: { click: close } }, "Close"),
    ),
    html(
      "dl",
      { class: "facts" },
      fact("Status", trace.status === null ? "running" : String(trace.status)),
      fact("Engines", trace.route?.replace("->", " → ")),
      fact("Path", trace.kv_path),
      fact("Pull", pull),
      fact(
        "First token",
        trace.first_token_ms === null ? null : milliseconds(trace.first_token_ms),
      ),
      fact("Total", trace.total_ms === null ? null : milliseconds(trace.total_ms)),
      fact("Retries", trace.retries || null),
      fact("End", trace.finish_reason),
      fact("Why these engines", trace.explanation),
      fact("Error", trace.error),
    ),
    rows.length
      ? html(
          "div",
          { class: "scroll whole", tabindex: 0, role: "region", "aria-label": "Spans" },
          waterfall,
        )
      : html("p", { class: "empty" }, "No spans are known of it."),
  );
}
