// Keeps a page of `controlbooth watch` up to date: asks for the parts that have changed, and draws curves and pictures.
"use strict";

const SOON = 600, LIVELY = 3000, QUIET = 15000;  // milliseconds between two questions: while runs are not read yet, while one runs, and else
const FRAME = 350;  // of an animation over the steps
const parts = document.getElementById("parts");
const link = document.getElementById("link");
const settings = JSON.parse(localStorage.getItem("watch") || "{}");
let version = document.body.dataset.version;

// ---- keeping up to date

function say(word, kind) {
  link.textContent = word;
  link.className = `link ${kind}`;
}

async function ask() {
  if (document.hidden) return;
  try {
    const answer = await fetch("parts", {headers: {"If-None-Match": `"${version}"`}, cache: "no-store"});
    if (answer.status === 404) return say("this run has gone", "away");
    if (answer.status === 403) return say("the token is no longer right", "away");
    if (answer.status === 200) take(await answer.json());
    say(isLively() ? "live" : "live, nothing runs", isLively() ? "" : "idle");
  } catch {
    say("no answer; trying again", "away");
  }
}

function take(answer) {
  version = answer.version;
  const there = new Map([...parts.children].map(one => [one.dataset.part, one]));
  for (const [key, html] of Object.entries(answer.parts)) {
    if (key === "charts") {
      document.getElementById("charts").textContent = html;
      continue;
    }
    let part = there.get(key);
    if (!part) {
      part = document.createElement("div");
      part.dataset.part = key;
      there.set(key, part);
    }
    const before = player(part);
    part.innerHTML = html;  // made by the server, which escapes what is not its own
    const image = part.querySelector("[data-player]");
    if (image) play(image, before);
    picker(part);
  }
  const keys = answer.keys.filter(key => key !== "charts");
  for (const [key, part] of there) if (!keys.includes(key)) part.remove();
  keys.forEach((key, place) => {
    if (parts.children[place] !== there.get(key)) parts.insertBefore(there.get(key), parts.children[place] || null);
  });
  if ("charts" in answer.parts) drawAll();
  tick();
  filter();
}

function isLively() {
  return parts.querySelector(".running, .starting, .silent, .waiting") !== null;
}

function again() {
  const pause = parts.querySelector(".card.reading, p.reading") ? SOON : isLively() ? LIVELY : QUIET;
  setTimeout(() => ask().finally(again), pause);
}

// ---- times, and what is shown of many runs

function ago(seconds) {
  if (seconds < 2) return "now";
  if (seconds < 120) return `${Math.round(seconds)} s ago`;
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (hours < 2) return `${minutes} min ago`;
  return hours < 48 ? `${hours} h ${minutes % 60} min ago` : `${Math.floor(hours / 24)} d ${hours % 24} h ago`;
}

function tick() {
  for (const one of document.querySelectorAll("time[data-at]")) {
    const text = ago(Math.max(0, Date.now() / 1000 - Number(one.dataset.at)));
    if (one.textContent !== text) {
      one.textContent = text;
      one.title = new Date(1000 * one.dataset.at).toLocaleString();
    }
  }
}

function filter() {
  const words = document.getElementById("words");
  if (!words) return;
  const asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const counts = new Map();
  for (const card of parts.children) {
    const text = card.textContent.toLowerCase();
    card.hidden = !asked.every(word => text.includes(word));
    const state = card.querySelector(".badge").textContent;
    if (!card.hidden) counts.set(state, (counts.get(state) || 0) + 1);
  }
  const shown = [...counts].map(([state, count]) => `${count} ${state}`).join(", ");
  document.getElementById("counts").textContent = shown;
  document.getElementById("none").hidden = parts.children.length > 0;
}

function picker(root) {
  const buttons = root.querySelectorAll("[data-pick]");
  const choose = kind => {
    settings.pick = kind;
    buttons.forEach(one => one.classList.toggle("on", one.dataset.pick === kind));
    root.querySelectorAll("[data-category]").forEach(one => { one.hidden = kind !== "" && one.dataset.category !== kind; });
  };
  buttons.forEach(one => one.addEventListener("click", () => choose(one.dataset.pick)));
  if (settings.pick && [...buttons].some(one => one.dataset.pick === settings.pick)) choose(settings.pick);
}

// ---- pictures over the steps

function player(part) {
  const one = part.querySelector("[data-player]");
  return one && one.state ? {at: one.state.at, isLast: one.state.at === one.state.steps.length - 1, stop: one.state.stop} : null;
}

function isStrip(image) {
  return image.naturalHeight < 200;  // small pictures side by side, whose pixels are looked at
}

function play(root, before) {
  const {steps, mark} = JSON.parse(root.dataset.player);
  const slider = root.querySelector("[data-at]"), image = root.querySelector("[data-frame]");
  const name = root.querySelector("[data-step]"), button = root.querySelector("[data-play]");
  let timer = null;
  const state = root.state = {steps, at: 0, stop: () => { clearInterval(timer); timer = null; button.textContent = "play"; }};
  const show = at => {
    state.at = at;
    slider.value = at;
    image.src = steps[at].picture;
    name.textContent = `step ${steps[at].step.toLocaleString("en")}` + (steps[at].step === mark ? ", since when it obeys" : "");
  };
  slider.max = steps.length - 1;
  slider.addEventListener("input", () => { state.stop(); show(Number(slider.value)); });
  button.addEventListener("click", () => {
    if (timer) return state.stop();
    button.textContent = "stop";
    steps.forEach(one => { new Image().src = one.picture; });  // so that none is waited for when its turn comes
    show(state.at === steps.length - 1 ? 0 : state.at);
    timer = setInterval(() => (state.at < steps.length - 1 ? show(state.at + 1) : state.stop()), FRAME);
  });
  root.querySelectorAll("img").forEach(one => {
    const size = () => { if (one.naturalWidth) one.style.width = `${isStrip(one) ? Math.max(one.naturalWidth, Math.min(900, 2.5 * one.naturalWidth)) : one.naturalWidth}px`; };
    one.addEventListener("load", size);
    size();
  });
  if (before) before.stop();
  show(before && !before.isLast ? Math.min(before.at, steps.length - 1) : steps.length - 1);
}

// ---- curves

const SVG = "http://www.w3.org/2000/svg";
const WIDE = 420, HIGH = 210, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 22;

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function short(value, percent, unit) {
  if (percent) return `${Math.round(100 * value)} %`;
  if (unit >= 1e-6 && Math.abs(value) < 1e5) return value.toFixed(Math.min(8, Math.max(0, -Math.floor(Math.log10(unit) + 1e-9))));
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

function smoothed(points, strength) {
  if (!strength || points.length < 5) return points;
  const keep = 1 - 1 / (1 + Number(strength));
  let sum = 0, weight = 0;
  return points.map(([step, value]) => {
    sum = keep * sum + value;
    weight = keep * weight + 1;
    return [step, sum / weight, sum / weight, sum / weight];
  });
}

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let power = Math.ceil(low); power <= high; power++) found.push(power);
    if (found.length > 1) return found.filter((_, place) => place % Math.ceil(found.length / 5) === 0);
  }
  const rough = (high - low) / 5 || 1, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(one => one * unit).find(one => one >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9 * step; value += step) found.push(Math.abs(value) < 1e-12 ? 0 : value);
  return found;
}

function draw(chart) {
  const lines = chart.lines.map(one => ({...one, drawn: smoothed(one.points, one.points.length > 20 ? settings.smooth : 0), hasBand: one.points.some(p => p[3] > p[2])}));
  const values = lines.flatMap(one => one.drawn.flatMap(point => [point[1], ...(one.hasBand && !settings.smooth ? [point[2], point[3]] : [])]));
  const log = settings.log && !chart.percent && values.every(value => value > 0);
  const scale = log ? Math.log10 : value => value;
  if (chart.percent) values.push(...chart.levels.map(one => one.value));
  let low = Math.min(...values.map(scale)), high = Math.max(...values.map(scale));
  if (chart.percent) { low = Math.max(low, -0.3); high = Math.min(high, 1.3); }
  const room = 0.05 * (high - low) || Math.abs(high) * 0.1 || 1;
  low -= room; high += room;
  const steps = lines.flatMap(one => one.drawn.map(point => point[0]));
  const first = Math.min(...steps), last = Math.max(...steps, first + 1);
  const x = step => LEFT + (step - first) / (last - first) * (WIDE - LEFT - RIGHT);
  const y = value => HIGH - BOTTOM - (Math.min(high, Math.max(low, scale(value))) - low) / (high - low) * (HIGH - TOP - BOTTOM);
  const svg = element("svg", {viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": chart.title});
  const marked = ticks(low, high, log), unit = log || marked.length < 2 ? 0 : marked[1] - marked[0];
  for (const tick of marked) {
    const at = y(log ? 10 ** tick : tick);
    svg.append(element("line", {class: "axis", x1: LEFT, x2: WIDE - RIGHT, y1: at, y2: at}));
    svg.append(element("text", {x: LEFT - 5, y: at + 3.5, "text-anchor": "end"}, short(log ? 10 ** tick : tick, chart.percent, unit)));
  }
  for (const tick of ticks(first, last, false)) {
    if (tick >= first) svg.append(element("text", {x: x(tick), y: HIGH - 6, "text-anchor": x(tick) > WIDE - 30 ? "end" : "middle"}, tick.toLocaleString("en")));
  }
  for (const level of chart.levels) {
    const kind = `k-${level.kind}`;
    svg.append(element("line", {class: `line dotted ${kind}`, x1: LEFT, x2: WIDE - RIGHT, y1: y(level.value), y2: y(level.value)}));
    svg.append(element("text", {x: WIDE - RIGHT, y: y(level.value) - 3, "text-anchor": "end"}, level.text));
  }
  for (const mark of chart.marks.filter(one => one.step >= first && one.step <= last)) {
    svg.append(element("line", {class: "mark", x1: x(mark.step), x2: x(mark.step), y1: TOP, y2: HIGH - BOTTOM}));
    const late = x(mark.step) > WIDE / 2;
    svg.append(element("text", {class: "mark", x: x(mark.step) + (late ? -4 : 4), y: HIGH - BOTTOM - 5, "text-anchor": late ? "end" : "start"}, mark.text));
  }
  for (const one of lines) {
    const kind = `k-${one.kind}`;
    if (one.hasBand && !settings.smooth) {
      const up = one.drawn.map(p => `${x(p[0]).toFixed(1)},${y(p[3]).toFixed(1)}`), down = one.drawn.map(p => `${x(p[0]).toFixed(1)},${y(p[2]).toFixed(1)}`);
      svg.append(element("polygon", {class: `band ${kind}`, points: [...up, ...down.reverse()].join(" ")}));
    }
    const path = one.drawn.map(p => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ");
    svg.append(element("polyline", {class: `line ${kind}${one.kind === "chance" || one.kind === "real" ? " dotted" : ""}`, points: path}));
    if (one.drawn.length < 30) for (const p of one.drawn) svg.append(element("circle", {class: `line ${kind}`, cx: x(p[0]), cy: y(p[1]), r: 1.6}));
  }
  const figure = document.createElement("figure"), caption = document.createElement("figcaption"), legend = document.createElement("div");
  figure.className = "chart";
  caption.textContent = chart.title;
  legend.className = "legend";
  const tell = step => {
    legend.replaceChildren(...lines.map(one => {
      const point = step === null ? one.drawn[one.drawn.length - 1] : one.drawn.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
      const item = document.createElement("span"), dash = document.createElement("i");
      item.className = `k-${one.kind}`;
      item.append(dash, `${one.name || "value"} ${short(point[1], chart.percent)}${step === null ? "" : ` at ${point[0].toLocaleString("en")}`}`);
      return item;
    }));
  };
  tell(null);
  const cross = element("line", {class: "cross", y1: TOP, y2: HIGH - BOTTOM, visibility: "hidden"});
  svg.append(cross);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * WIDE;
    if (at < LEFT || at > WIDE - RIGHT) return;
    for (const end of ["x1", "x2"]) cross.setAttribute(end, at);
    cross.setAttribute("visibility", "visible");
    tell(first + (at - LEFT) / (WIDE - LEFT - RIGHT) * (last - first));
  });
  svg.addEventListener("pointerleave", () => { cross.setAttribute("visibility", "hidden"); tell(null); });
  figure.append(caption, svg, legend);
  return figure;
}

function drawAll() {
  const place = document.querySelector("[data-charts]"), data = document.getElementById("charts");
  if (!place || !data) return;
  const charts = JSON.parse(data.textContent || "[]").filter(chart => chart.lines.some(one => one.points.length));
  charts.forEach(chart => { chart.lines = chart.lines.filter(one => one.points.length); });
  place.replaceChildren(...charts.map(draw));
  if (!charts.length) place.textContent = "Nothing was logged yet.";
}

function tools() {
  for (const one of document.querySelectorAll("[data-setting]")) {
    const name = one.dataset.setting, isBox = one.type === "checkbox";
    if (settings[name] !== undefined) one[isBox ? "checked" : "value"] = settings[name];
    one.addEventListener("input", () => {
      settings[name] = isBox ? one.checked : Number(one.value);
      localStorage.setItem("watch", JSON.stringify({log: settings.log, smooth: settings.smooth}));
      drawAll();
    });
  }
}

document.querySelectorAll("form").forEach(one => one.addEventListener("submit", event => event.preventDefault()));
document.querySelectorAll("[data-player]").forEach(one => play(one, null));
document.getElementById("words")?.addEventListener("input", filter);
document.addEventListener("visibilitychange", ask);
picker(document);
tools();
drawAll();
tick();
filter();
setInterval(tick, 1000);
again();
