// The page of `gfldeploy serve`: sends a picture to /v1/detect, draws what comes back, and shows the counters of /metrics.
"use strict";

const POLL_MS = 2000;
const STAGES = [
  ["queue", "waiting for its batch"],
  ["decode", "decoding"],
  ["preprocess", "preprocessing"],
  ["infer", "network and NMS"],
  ["rest", "transfer and the rest"],
];
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);

let apiKey = "";
let file = null; // the picture that is shown, and what was found in it
let found = null;
let underWay = null; // an AbortController
let before = null; // the counters of the last poll

// --- Small tools -----------------------------------------------------------------------------------------------------

function element(name, attributes = {}, text = null) {
  const svg = ["g", "rect", "text", "title"].includes(name);
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

// As in drawn pictures: always the same hue for a class, and far from those of its neighbours.
function colour(id) {
  return `hsl(${((id * 0.618034) % 1) * 360} 85% ${id % 2 ? 40 : 50}%)`;
}

const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
const count = (number, one) => `${number} ${one}${number === 1 ? "" : "s"}`;

function showError(title, text) {
  at("error").replaceChildren(element("strong", {}, `${title} `), text);
  at("error").hidden = false;
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.status === 401) at("key-form").hidden = false;
  return answer;
}

// --- A picture ---------------------------------------------------------------------------------------------------------

async function detect(chosen) {
  underWay?.abort();
  underWay = new AbortController();
  const { signal } = underWay;
  file = chosen;
  found = null;
  at("error").hidden = true;
  at("figure").hidden = false;
  at("stage").classList.add("full");
  at("frame").className = "waiting";
  at("caption").textContent = `Looking at ${chosen.name} ...`;
  draw();
  const shown = show(chosen);
  const type = chosen.type.startsWith("image/") ? chosen.type : "application/octet-stream";
  const start = performance.now();
  try {
    // All that was found: the slider then needs no server.
    const answer = await ask("v1/detect?threshold=0", { method: "POST", body: chosen, signal, headers: { "Content-Type": type } });
    const body = await answer.json();
    const took = performance.now() - start;
    if (!answer.ok) throw Object.assign(new Error(body.error.message), { remedy: body.error.remedy, status: answer.status });
    found = { ...body.images[0], took };
    if (!(await shown)) placeholder(found);
  } catch (error) {
    if (error.name === "AbortError") return;
    const asked = error.status === 401 ? "this server asks for an API key: enter it below." : `${error.message}. ${error.remedy}`;
    const known = error.status ? asked : "the server cannot be reached.";
    showError(error.status ? `Not answered (${error.status}):` : "Not answered:", known);
    at("caption").textContent = chosen.name;
  }
  at("frame").classList.remove("waiting");
  draw();
}

// Whether this browser can show it.
function show(chosen) {
  const picture = at("picture");
  URL.revokeObjectURL(picture.src);
  return new Promise((settle) => {
    picture.onload = () => settle(true);
    picture.onerror = () => settle(false);
    picture.alt = "";
    picture.src = URL.createObjectURL(chosen);
  });
}

function placeholder({ width, height }) {
  const picture = at("picture");
  picture.onload = draw;
  picture.src = `data:image/svg+xml,${encodeURIComponent(`<svg xmlns="${SVG}" width="${width}" height="${height}"/>`)}`;
  at("frame").classList.add("blank");
}

// --- What was found in it ----------------------------------------------------------------------------------------------

function draw() {
  const threshold = Number(at("threshold").value);
  at("threshold-value").textContent = threshold.toFixed(2);
  at("boxes").replaceChildren();
  at("rows").replaceChildren();
  const kept = found ? found.detections.filter((one) => one.score >= threshold) : [];
  at("table-scroll").hidden = kept.length === 0;
  at("nothing").hidden = kept.length > 0;
  at("count").textContent = found ? `${kept.length} of ${found.detections.length}` : "";
  at("nothing").textContent = found ? "Nothing scores so much: lower the score." : file ? "None." : "No picture yet.";
  drawTimes();
  if (!found) return;
  const told = new Map();
  for (const one of kept) told.set(one.class, (told.get(one.class) ?? 0) + 1);
  const words = [...told].map(([name, number]) => `${number} × ${name}`).join(", ") || "nothing";
  const unseen = at("frame").classList.contains("blank") ? " This browser cannot show such a file, so its place is left empty." : "";
  at("caption").textContent = `${file.name}, ${found.width} × ${found.height} px: ${words}.${unseen}`;
  at("picture").alt = `${file.name}, with boxes around: ${words}`;
  at("boxes").setAttribute("viewBox", `0 0 ${found.width} ${found.height}`);
  at("boxes").setAttribute("preserveAspectRatio", "none");
  const groups = kept.map(row);
  at("boxes").append(...groups.reverse()); // the best on top
  groups.forEach(label);
}

function row(one) {
  const [x1, y1, x2, y2] = one.box;
  const [width, height] = [Math.max(x2 - x1, 1), Math.max(y2 - y1, 1)];
  const group = element("g", { color: colour(one.class_id) });
  group.append(element("rect", { class: "box", stroke: "currentColor", x: x1, y: y1, width, height }));
  group.detection = one;

  const line = element("tr");
  const button = element("button", { type: "button", "aria-pressed": "false" });
  const swatch = element("span", { class: "swatch" });
  swatch.style.background = colour(one.class_id);
  button.append(swatch, one.class);
  const cell = element("td");
  cell.append(button);
  const place = [x1, y1, x2 - x1, y2 - y1].map(Math.round).join(", ");
  line.append(cell, element("td", { class: "number" }, one.score.toFixed(3)), element("td", { class: "number" }, place));
  const mark = (on) => {
    group.classList.toggle("marked", on);
    line.classList.toggle("marked", on);
  };
  const pressed = () => button.getAttribute("aria-pressed") === "true";
  button.onclick = () => {
    button.setAttribute("aria-pressed", String(!pressed()));
    mark(pressed());
  };
  line.onmouseenter = button.onfocus = () => mark(true);
  line.onmouseleave = button.onblur = () => mark(pressed());
  at("rows").append(line);
  return group;
}

// The class and score of a box, in letters of one size however large the picture is.
function label(group) {
  const scale = found.width / (at("picture").clientWidth || found.width);
  const one = group.detection;
  const size = 12 * scale;
  const text = element("text", { "font-size": size }, `${one.class} ${one.score.toFixed(2)}`);
  group.append(text);
  const width = text.getComputedTextLength() + 0.6 * size;
  const height = 1.35 * size;
  const x = Math.max(0, Math.min(one.box[0], found.width - width));
  const y = one.box[1] >= height ? one.box[1] - height : Math.max(one.box[1], 0);
  text.setAttribute("x", x + 0.3 * size);
  text.setAttribute("y", y + size);
  text.setAttribute("fill", inkOn(one.class_id));
  group.insertBefore(element("rect", { x, y, width, height, fill: "currentColor" }), text);
}

// Black or white, whichever is easier to read on the colour of a class.
function inkOn(id) {
  const hue = ((id * 0.618034) % 1) * 360;
  return id % 2 === 0 && hue > 40 && hue < 200 ? "black" : id % 2 && hue > 45 && hue < 190 ? "black" : "white";
}

function drawTimes() {
  at("times").hidden = !found;
  at("no-times").hidden = Boolean(found);
  if (!found) return;
  const times = { ...found.times_ms };
  const known = Object.values(times).reduce((sum, value) => sum + value, 0);
  times.rest = Math.max(found.took - known, 0);
  at("bar").replaceChildren();
  at("stages").replaceChildren();
  for (const [stage, title] of STAGES) {
    const part = element("span");
    part.style.width = `${(100 * times[stage]) / found.took}%`;
    part.style.background = `var(--${stage})`;
    at("bar").append(part);
    const swatch = element("span", { class: "swatch" });
    swatch.style.background = `var(--${stage})`;
    const term = element("dt");
    term.append(swatch, element("span", {}, title));
    at("stages").append(term, element("dd", {}, ms(times[stage])));
  }
  const term = element("dt");
  term.append(element("span"), element("strong", {}, "from here and back"));
  at("stages").append(term, element("dd", {}, ms(found.took)));
}

// --- The server ----------------------------------------------------------------------------------------------------------

async function askModel() {
  const answer = await ask("v1/model");
  if (!answer.ok) return;
  const model = await answer.json();
  const parts = [model.name ?? model.bundle?.name, model.engine, model.precision, model.device, count(model.classes.length, "class").replace("classs", "classes")];
  at("model").textContent = parts.filter(Boolean).join(" · ");
  document.title = `${parts[0]} - gfldeploy`;
}

// Prometheus' text: sums over all labels but those asked for.
function reader(text) {
  const lines = [...text.matchAll(/^(\w+)(?:\{(.*)\})? (\S+)$/gm)];
  return (name, label = "") =>
    lines.reduce((sum, [, found, labels, value]) => (found === name && (labels ?? "").includes(label) ? sum + Number(value) : sum), 0);
}

async function poll() {
  if (document.hidden) return;
  let text;
  try {
    const answer = await ask("metrics");
    if (!answer.ok) {
      state(answer.status === 401 ? "needs a key" : `answers ${answer.status}`, "bad");
      return;
    }
    text = await answer.text();
  } catch {
    state("not reached", "bad");
    return;
  }
  const read = reader(text);
  if (!at("model").dataset.known) {
    at("model").dataset.known = "yes";
    askModel().catch(() => delete at("model").dataset.known);
  }
  state(read("gfldeploy_ready") ? "ready" : "not ready", read("gfldeploy_ready") ? "good" : "bad");
  const now = {
    time: performance.now(),
    answered: read("gfldeploy_images_total", 'outcome="answered"'),
    rejected: read("gfldeploy_images_total", 'outcome="rejected"'),
    failed: read("gfldeploy_images_total", 'outcome="bad"') + read("gfldeploy_images_total", 'outcome="failed"'),
    batches: read("gfldeploy_batch_size_images_count"),
    batched: read("gfldeploy_batch_size_images_sum"),
    queued: read("gfldeploy_stage_duration_seconds_sum", 'stage="queue"'),
    queues: read("gfldeploy_stage_duration_seconds_count", 'stage="queue"'),
    cpu: read("process_cpu_seconds_total"),
  };
  const last = before ?? now;
  const since = (key) => now[key] - last[key];
  const seconds = since("time") / 1000;
  const mean = (sum, number, digits) => (since(number) > 0 ? (since(sum) / since(number)).toFixed(digits) : "–");
  const counters = [
    ["images a second", seconds ? (since("answered") / seconds).toFixed(1) : "–"],
    ["images answered", now.answered.toLocaleString("en")],
    ["rejected", now.rejected.toLocaleString("en")],
    ["unusable or failed", now.failed.toLocaleString("en")],
    ["waiting now", read("gfldeploy_images_waiting")],
    ["in flight now", read("gfldeploy_images_in_flight")],
    ["images in a batch", mean("batched", "batches", 1)],
    ["time in the queue", since("queues") > 0 ? ms((1000 * since("queued")) / since("queues")) : "–"],
    ["CPUs busy", seconds ? (since("cpu") / seconds).toFixed(1) : "–"],
    ["memory", `${(read("process_resident_memory_bytes") / 1e6).toFixed(0)} MB`],
  ];
  at("counters").replaceChildren(
    ...counters.map(([title, value]) => {
      const pair = element("div");
      pair.append(element("dt", {}, title), element("dd", {}, value));
      return pair;
    }),
  );
  at("live-note").textContent = "means are over the last 2 s";
  before = now;
}

function state(text, light) {
  if (at("state-text").textContent !== text) at("state-text").textContent = text;
  at("light").className = light;
}

// --- What the user does ----------------------------------------------------------------------------------------------------

at("file").onchange = (event) => event.target.files[0] && detect(event.target.files[0]);
at("threshold").oninput = draw;
at("key-form").onsubmit = (event) => {
  event.preventDefault();
  apiKey = at("key").value.trim();
  at("key-form").hidden = true;
  poll();
  if (file) detect(file);
};
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  at("stage").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("stage").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("stage").classList.remove("over");
  if (event.dataTransfer.files[0]) detect(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files[0]) detect(event.clipboardData.files[0]);
});
new ResizeObserver(() => found && draw()).observe(at("picture"));
document.addEventListener("visibilitychange", poll);
const here = new URL("v1/detect", location.href);
at("curl").textContent = `curl --data-binary @picture.jpg -H "Content-Type: image/jpeg" "${here}?threshold=0.5"`;
poll();
setInterval(poll, POLL_MS);
