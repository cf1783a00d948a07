// Watches the deployment and shows it. The API key is kept only in the variable `key`.

import { chart, spark } from "./charts.js";
import { amount, byId, bytes, clockTime, count, counted, html, milliseconds, percent } from "./dom.js";
import { drawFlow } from "./flow.js";
import { drawRequests, drawTrace } from "./requests.js";
import { drawCaches, drawEvents, drawTables } from "./tables.js";

const RETRY_MS = [500, 1000, 2000, 5000, 10000],
  LONGEST_HISTORY = 150,
  WATCH_EVERY_MS = 1000,
  REQUESTS_EVERY_MS = 2000;
let key = "",
  status = null,
  history = [],
  paused = false,
  chosen = null,
  failures = 0,
  asking = false,
  shown = "";

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});
const ask = (path) => fetch(path, { headers: headers(), cache: "no-store", credentials: "omit" });

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function askForKey(wrong) {
  byId("main").hidden = true;
  byId("key-form").hidden = false;
  pill(wrong ? "wrong key" : "needs a key", "busy");
  notice(wrong ? "This key is wrong." : "");
  byId("key").focus();
}

async function watch() {
  let response;
  try {
    response = await ask("status");
    if (response.status === 401) return askForKey(key !== "");
    if (!response.ok)
      throw new Error((await response.json()).error?.message ?? `HTTP ${response.status}`);
    byId("key-form").hidden = true;
    byId("main").hidden = false;
    notice("");
    failures = 0;
    take(await response.json());
    // The router needs 16 ms to describe 1,000 engines, so large deployments are read less often.
    setTimeout(watch, WATCH_EVERY_MS + 4 * status.engines.length);
  } catch (error) {
    const wait = RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)];
    pill("not connected", "down");
    notice(`Not connected: ${error.message}. Trying again.`);
    setTimeout(watch, wait);
  }
}

function take(next) {
  const latest = history.at(-1)?.at ?? 0;
  history = [...history, ...next.history.filter((point) => point.at > latest)].slice(
    -LONGEST_HISTORY,
  );
  status = next;
  if (paused) return;
  try {
    draw();
  } catch (error) {
    // Log the error on the console and go on: the next status is drawn again.
    reportError(error);
  }
}

function pill(text, look) {
  const place = byId("state");
  if (place.textContent !== text) place.textContent = text;
  place.className = `pill ${look}`;
}

function tile(name, value, per, more, points, bad) {
  const unit = value === "–" ? "" : per;
  return html(
    "div",
    {
      class: bad ? "tile bad" : "tile",
      role: "group",
      "aria-label": `${name}: ${value} ${unit}${more ? `, ${more}` : ""}`,
    },
    html("p", { class: "name" }, name),
    html("p", { class: "value" }, value, html("span", { class: "unit" }, ` ${unit}`)),
    html("p", { class: "more" }, more || "\u00a0"),
    points ? spark(points) : null,
  );
}

function tiles() {
  const now = status.rates,
    readings = status.engines.map((engine) => engine.reading).filter(Boolean);
  const sum = (pick) => readings.reduce((total, reading) => total + pick(reading), 0);
  const series = (pick) => history.map(pick),
    pulled = sum((reading) => reading.pulls.bytes_per_s);
  byId("tiles").replaceChildren(
    tile(
      "Requests",
      amount(now.requests_per_s),
      "/s",
      `${count(status.requests)} in all`,
      series((point) => point.requests_per_s),
    ),
    tile(
      "Output tokens",
      amount(now.output_tokens_per_s),
      "/s",
      `${amount(now.prompt_tokens_per_s)} prompt tokens/s`,
      series((point) => point.output_tokens_per_s),
    ),
    tile(
      "In flight",
      String(status.in_flight),
      "",
      `${sum((reading) => reading.running)} running, ${sum((reading) => reading.waiting)} waiting`,
      null,
    ),
    tile(
      "First token",
      now.first_token_ms ? amount(now.first_token_ms.p50) : "–",
      "ms",
      now.first_token_ms ? `p95 ${milliseconds(now.first_token_ms.p95)}` : "",
      series((point) => point.first_token_ms?.p50 ?? 0),
    ),
    tile(
      "Between tokens",
      now.inter_token_ms ? amount(now.inter_token_ms.p50) : "–",
      "ms",
      now.inter_token_ms ? `p95 ${milliseconds(now.inter_token_ms.p95)}` : "",
      series((point) => point.inter_token_ms?.p50 ?? 0),
    ),
    tile(
      "Pulled",
      ...bytes(pulled, "/s").split(" "),
      `${counted(
        sum((reading) => reading.pulls.number),
        "pull",
      )}, ${sum((reading) => reading.failed_pulls + reading.refused_pulls)} failed`,
      null,
    ),
    tile(
      "Errors",
      amount(now.errors_per_s),
      "/s",
      `${count(status.errors)} in all`,
      series((point) => point.errors_per_s),
      now.errors_per_s > 0,
    ),
  );
}

function draw() {
  if (!status || byId("main").hidden) return;
  const looks = { ok: "ready", unavailable: "down" };
  const numDown = status.engines.filter((engine) => engine.is_down).length + status.gone.length;
  if (status.state !== "ok") pill(status.state, looks[status.state] ?? "busy");
  else pill(numDown ? `serving, ${numDown} down` : "serving", numDown ? "busy" : "ready");
  byId("model").textContent = status.model;
  byId("since").textContent = `${clockTime(status.at)} · pdlaunch ${status.version}`;
  document.title = `${status.model} · pdlaunch`;
  tiles();
  if (!byId("drawing").hidden) drawFlow(byId("drawing"), status);
  if (!byId("tables").hidden) drawTables(byId("tables"), status);
  const { kind, why, advice } = status.bottleneck;
  byId("bottleneck").textContent =
    `Limited by: ${kind.replace("_", " ")} (${why}${advice ? `; ${advice}` : ""})`;
  byId("routes").textContent = status.routes.length
    ? `Last prompts: ${status.routes.map((one) => `${percent(one.share)} ${one.kind} (${one.reason})`).join(", ")}`
    : "";
  const times = history.map((point) => point.at);
  const percentiles = (pick) =>
    ["p50", "p95"].map((kind) => ({
      name: kind,
      kind,
      points: history.map((point) => pick(point)?.[kind] ?? null),
    }));
  chart(
    byId("first-token"),
    percentiles((point) => point.first_token_ms),
    times,
    "ms",
    "Time to first token",
  );
  chart(
    byId("inter-token"),
    percentiles((point) => point.inter_token_ms),
    times,
    "ms",
    "Time between tokens",
  );
  chart(
    byId("tokens"),
    [
      { name: "prompt", kind: "in", points: history.map((point) => point.prompt_tokens_per_s) },
      { name: "output", kind: "out", points: history.map((point) => point.output_tokens_per_s) },
    ],
    times,
    "/s",
    "Tokens per second",
  );
  drawCaches(byId("caches"), status);
  // Redraw the list of events only if it has changed, to keep its scroll position.
  const events = JSON.stringify(status.events);
  if (events !== shown) drawEvents(byId("events"), status);
  shown = events;
}

async function readRequests() {
  if (asking || paused || !status || document.hidden || byId("main").hidden) return;
  asking = true;
  try {
    const response = await ask(`requests?${byId("which").value}=20`);
    if (response.ok)
      drawRequests(byId("requests"), (await response.json()).requests, chosen, choose);
  } catch {
    // Ignored: `watch` reports that the router cannot be reached.
  } finally {
    asking = false;
  }
}

async function choose(id) {
  chosen = id;
  const response = await ask(`requests/${encodeURIComponent(id)}`).catch(() => null);
  if (chosen !== id) return;
  if (response?.ok) drawTrace(byId("trace"), await response.json(), closeTrace);
  else
    byId("trace").replaceChildren(
      html("p", { class: "empty" }, "This request is not remembered any more."),
    );
  readRequests();
}

function closeTrace() {
  const id = chosen;
  chosen = null;
  byId("trace").replaceChildren();
  byId("requests")
    .querySelector(`[data-id="${CSS.escape(id ?? "")}"]`)
    ?.focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value;
  byId("key").value = "";
  watch();
});
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  byId("pause").textContent = paused ? "Resume" : "Pause";
  if (!paused) draw();
});
byId("as-table").addEventListener("click", () => {
  const tables = byId("tables").hidden;
  byId("tables").hidden = !tables;
  byId("drawing").hidden = tables;
  byId("as-table").setAttribute("aria-pressed", String(tables));
  draw();
});
byId("which").addEventListener("change", readRequests);
byId("theme").addEventListener("change", () => {
  document.documentElement.dataset.theme = byId("theme").value;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chosen !== null) closeTrace();
});
let width = 0;
new ResizeObserver(([entry]) => {
  if (Math.abs(entry.contentRect.width - width) < 1) return;
  width = entry.contentRect.width;
  requestAnimationFrame(draw);
}).observe(byId("main"));
setInterval(readRequests, REQUESTS_EVERY_MS);
watch();
