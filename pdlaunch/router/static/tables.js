// Shows the content of the drawing as tables, and lists events.

import { amount, bytes, clockTime, html, percent, shownState, svg, table, tone, why } from "./dom.js";
import { listed } from "./flow.js";

const cell = (value, kind = "number") => html("td", { class: kind }, value);
const speed = (value) => (value === null ? "–" : `${amount(value)} GB/s`);

export function drawTables(container, status) {
  const engines = listed(status).map((engine) => {
    const reading = engine.reading;
    return html(
      "tr",
      {},
      html("th", { scope: "row" }, engine.name),
      cell(engine.role ?? "–", ""),
      cell(engine.host ?? "", "hide-narrow"),
      cell(
        why(engine) ? `${shownState(engine)}: ${why(engine)}` : shownState(engine),
        `tone-${tone(engine)}`,
      ),
      cell(amount(engine.load)),
      cell(amount(reading?.running)),
      cell(amount(reading?.waiting)),
      cell(percent(reading?.kv_usage)),
      cell(percent(reading?.host_usage)),
      cell(percent(reading?.cache?.device)),
      cell(percent(reading?.cache?.host)),
      cell(percent(reading?.cache?.remote)),
      cell(bytes(reading?.pulls.bytes_per_s, "/s")),
      cell(amount(reading?.failed_pulls)),
      cell(amount(reading?.refused_pulls)),
    );
  });
  const number = (name) => ({ name, class: "number" });
  const pairs = status.pairs.map((pair) =>
    html(
      "tr",
      {},
      html("th", { scope: "row" }, `${pair.prefill} → ${pair.decode}`),
      cell(pair.path, ""),
      cell(speed(pair.gigabytes_per_s)),
      cell(speed(pair.pulls.gigabytes_per_s)),
      cell(bytes(pair.pulls.bytes_per_s, "/s")),
      cell(bytes(pair.pulls.num_bytes)),
      cell(amount(pair.pulls.number)),
      cell(pair.last_failure || pair.slow || "–", pair.last_failure || pair.slow ? "bad-text" : ""),
    ),
  );
  container.replaceChildren(
    html(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": "Engines as a table" },
      table(
        "Engines",
        [
          { name: "Engine" },
          { name: "Role" },
          { name: "Host", class: "hide-narrow" },
          { name: "State" },
          ...[
            "Load",
            "Running",
            "Waiting",
            "KV",
            "Host KV",
            "Device hits",
            "Host hits",
            "Pulled",
            "Pulls",
            "Failed",
            "Refused",
          ].map(number),
        ],
        engines,
      ),
    ),
    html(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": "Pairs as a table" },
      table(
        "Pairs",
        [
          { name: "Pair" },
          { name: "Path" },
          ...["Measured", "Last pulls", "Now", "Moved", "Pulls"].map(number),
          { name: "Last failure" },
        ],
        pairs,
      ),
    ),
  );
}

export function drawCaches(container, status) {
  const rows = listed(status)
    .filter((engine) => engine.state !== "gone")
    .map((engine) => {
      const cache = engine.reading?.cache,
        parts = cache
          ? [
              ["device", cache.device],
              ["host", cache.host],
              ["remote", cache.remote],
            ]
          : [];
      const words = cache
        ? `device ${percent(cache.device)} · host ${percent(cache.host)} · pulled ${percent(cache.remote)}`
        : "no prompts in the last ten seconds";
      let x = 0;
      const bar = svg(
        "svg",
        {
          viewBox: "0 0 100 10",
          preserveAspectRatio: "none",
          role: "img",
          "aria-label": `${engine.name}: ${words}`,
        },
        svg("rect", { class: "track", width: 100, height: 10 }),
      );
      for (const [kind, share] of parts) {
        bar.append(
          svg("rect", { class: kind, x: x * 100, width: Math.min(share, 1 - x) * 100, height: 10 }),
        );
        x = Math.min(1, x + share);
      }
      return html(
        "div",
        { class: "cache" },
        html("b", {}, engine.name),
        bar,
        html("span", { class: "quiet" }, words),
      );
    });
  container.replaceChildren(
    ...(rows.length ? rows : [html("p", { class: "empty" }, "No engine yet.")]),
  );
}

export function drawEvents(container, status) {
  const items = [...status.events]
    .reverse()
    .map((event) =>
      html(
        "li",
        { class: event.is_bad ? "is-bad" : "" },
        html("time", { datetime: new Date(event.at * 1000).toISOString() }, clockTime(event.at)),
        html("span", { class: "who" }, event.name || "launch"),
        html("span", { class: "what" }, event.text),
      ),
    );
  container.replaceChildren(
    items.length
      ? html("ol", {}, ...items)
      : html("p", { class: "empty" }, "Nothing has happened since the router started."),
  );
}
