// The page of a rater. What it knows of a screen is what /study says: opaque names, a question, and no method.
// An answer waits in the browser's own storage until the server has it on its disk, and is sent again until then.
"use strict";

const get = (id) => document.getElementById(id);
const rater = new URLSearchParams(location.search).get("rater");
const LETTERS = "ABCDEFGH";
const SMALL = 200; // pixels: pictures below it are enlarged as squares, so that their pixels can be judged
const AHEAD = 3; // screens whose pictures are loaded before they are needed
const MAGNIFIER =
  '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2.4" stroke-linecap="round">' +
  '<circle cx="10.5" cy="10.5" r="6.5"/><path d="m16 16 5 5M10.5 8v5M8 10.5h5"/></svg>';

let study, screens, place, picked, ready, shownAt, overlay, waiting, store;
let wait = 1000, sending = false, large = 0, busy = false;

// ---- answers on their way to the server

function keep() {
  try { localStorage.setItem(store, JSON.stringify(waiting)); } catch { /* a browser without storage still sends */ }
  get("saved").textContent = waiting.length > 1 || wait > 1000
    ? `${waiting.length} answer${waiting.length === 1 ? "" : "s"} not stored yet` : "";
}

async function send() {
  if (sending) return;
  sending = true;
  while (waiting.length) {
    const answer = waiting[0];
    let response;
    try {
      response = await fetch("/answers", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(answer),
      });
    } catch { /* no connection: below */ }
    if (!response || response.status >= 500 || response.status === 403) {
      wait = Math.min(wait * 2, 15000);
      keep();
      await new Promise((done) => setTimeout(done, wait));
      continue;
    }
    wait = 1000;
    const screen = screens.find((one) => one.trial === answer.trial);
    if (response.status === 409 && screen) {
      // Another window has answered this screen: its answer counts, and what was to take the place of ours is void.
      screen.answer = (await response.json()).counts;
      waiting = waiting.filter((one) => one.trial !== answer.trial);
    } else {
      if (!response.ok && screen) screen.answer = null; // refused: asked again
      waiting.shift();
    }
    keep();
  }
  sending = false;
  progress();
}

function identity() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((one) => one.toString(16).padStart(2, "0")).join("");
}

function answer(ranks) {
  if (!ready || busy) return;
  const screen = screens[place];
  const before = screen.answer;
  if (!before || before.ranks.join() !== ranks.join()) {
    const made = {
      id: identity(), rater, trial: screen.trial, pictures: screen.pictures, ranks,
      seconds: (performance.now() - shownAt) / 1000, replaces: before ? before.id : "",
    };
    screen.answer = { id: made.id, ranks };
    waiting.push(made);
    keep();
    send();
  }
  busy = true;
  mark(ranks);
  setTimeout(() => { busy = false; go(next(place)); }, 160);
}

// ---- which screen is shown

function next(from) {
  for (let step = 1; step <= screens.length; step++) {
    const one = (from + step) % screens.length;
    if (!screens[one].answer) return one;
  }
  return screens.length; // all are answered
}

function show(id) {
  for (const one of ["intro", "turn", "ask", "end", "trouble"]) get(one).hidden = one !== id;
}

function progress() {
  const done = screens.filter((one) => one.answer).length;
  get("done").style.width = `${100 * done / screens.length}%`;
  get("track").setAttribute("aria-valuemax", screens.length);
  get("track").setAttribute("aria-valuenow", done);
  get("count").textContent = `${done} of ${screens.length}`;
  get("stored").textContent = waiting.length
    ? "Your last answers are on their way: please keep the page open." : `All ${done} answers are stored.`;
}

function go(to) {
  const before = place;
  place = to;
  ready = false; // until its pictures are there
  progress();
  get("back").hidden = place <= 0 || !screens.length;
  get("on").hidden = place >= screens.length || !screens[place].answer;
  if (place >= screens.length) { show("end"); return; }
  const asks = screens[place].asks;
  if (before !== null && before < screens.length && screens[before].asks !== asks && to > before) {
    get("next-question").textContent = asks;
    show("turn");
    get("go").focus();
    return;
  }
  draw();
}

async function draw() {
  const screen = screens[place], at = place;
  picked = screen.answer ? order(screen.answer.ranks) : [];
  ready = false;
  get("question").textContent = screen.asks;
  get("prompt").textContent = screen.prompt;
  get("prompt").hidden = !screen.prompt;
  get("given").hidden = !screen.given.length;
  get("given").replaceChildren(...screen.given.map((name, number) => {
    const figure = document.createElement("figure");
    const shown = image(name, screen.photographs ? "photograph" : "guide picture");
    shown.addEventListener("click", () => zoom(screen.pictures.length + number));
    figure.append(shown);
    return figure;
  }));
  get("pictures").replaceChildren(...screen.pictures.map(tile));
  actions(screen);
  show("ask");
  layout();
  if (screen.answer) mark(screen.answer.ranks);
  else if (study.form === "rankings") number();
  const all = [...get("pictures").querySelectorAll("img:not(.over)"), ...get("given").querySelectorAll("img")];
  try { await Promise.all(all.map((one) => one.decode())); } catch {
    if (at === place) fail("A picture could not be loaded.", () => { show("ask"); draw(); });
    return;
  }
  if (at !== place) return;
  for (const one of document.querySelectorAll("#ask img")) one.classList.toggle("pixels", one.naturalWidth < SMALL);
  ready = true;
  shownAt = performance.now();
  for (const one of document.querySelectorAll(".choose")) one.disabled = false;
  for (let step = 1; step <= AHEAD; step++) {
    const later = screens[place + step];
    if (later) for (const name of [...later.pictures, ...later.given]) new Image().src = address(name);
  }
}

const address = (name) => `/pictures/${name}.png`;

function image(name, text) {
  const made = new Image();
  made.src = address(name);
  made.alt = text;
  made.draggable = false;
  return made;
}

function tile(name, number) {
  const made = document.createElement("div");
  made.className = "picture";
  const choose = document.createElement("button");
  choose.className = "choose";
  choose.disabled = true;
  choose.append(image(name, `picture ${LETTERS[number]}`));
  choose.addEventListener("click", () => pick(number));
  const over = screens[place].overlay && overlay ? image(screens[place].given[0], "") : null;
  if (over) { over.className = "over"; choose.append(over); }
  const badge = document.createElement("span");
  badge.className = "badge";
  badge.textContent = LETTERS[number];
  const magnify = document.createElement("button");
  magnify.className = "magnify";
  magnify.innerHTML = MAGNIFIER;
  magnify.setAttribute("aria-label", `enlarge picture ${LETTERS[number]}`);
  magnify.addEventListener("click", () => zoom(number));
  made.append(choose, badge, magnify);
  return made;
}

function layout() {
  if (get("ask").hidden) return;
  const stage = get("stage"), screen = screens[place], gap = 12;
  const portrait = matchMedia("(orientation: portrait)").matches;
  let width = stage.clientWidth, height = stage.clientHeight;
  const count = screen.given.length;
  if (count) {
    const side = portrait ? Math.min(height * 0.24, (width - gap * (count - 1)) / count)
      : Math.min(width * (count > 1 ? 0.4 : 0.25) / Math.min(count, 2), height * (count > 2 ? 0.45 : 0.75));
    document.documentElement.style.setProperty("--given", `${Math.floor(side)}px`);
    get("given").style.cssText = portrait || count === 1 ? "" :
      `display: grid; grid-template-columns: repeat(${Math.min(count, 2)}, auto)`;
    if (portrait) height -= side + gap;
    else width -= side * Math.min(count, 2) + gap * 2;
  }
  let best = [0, 1];
  for (let columns = 1; columns <= screen.pictures.length; columns++) {
    const rows = Math.ceil(screen.pictures.length / columns);
    const side = Math.min((width - gap * (columns - 1)) / columns, (height - gap * (rows - 1)) / rows);
    if (side > best[0]) best = [side, columns];
  }
  const style = get("pictures").style;
  style.setProperty("--side", `${Math.floor(best[0])}px`);
  style.setProperty("--columns", best[1]);
}

// ---- answering

function button(text, key, act) {
  const made = document.createElement("button");
  made.textContent = `${text} `;
  if (key) {
    const shown = document.createElement("kbd");
    shown.textContent = key;
    made.append(shown);
  }
  made.addEventListener("click", act);
  return made;
}

function actions(screen) {
  const all = [];
  if (study.ties) all.push(button("No difference", "0", tie));
  if (study.form === "rankings") {
    const done = button("Next", "Enter", finish);
    done.className = "main";
    done.id = "finish";
    all.push(button("Clear", "", () => { picked = []; number(); }), done);
  }
  if (screen.overlay) {
    const made = button("Guide on top", "T", toggle);
    made.setAttribute("aria-pressed", String(overlay));
    all.push(made);
  }
  get("actions").replaceChildren(...all);
}

const order = (ranks) => ranks.map((_, one) => one).sort((one, other) => ranks[one] - ranks[other]);

function tie() {
  if (study.ties) answer(screens[place].pictures.map(() => 1));
}

function toggle() {
  if (!screens[place].overlay) return;
  overlay = !overlay;
  for (const one of document.querySelectorAll(".choose")) {
    one.querySelector(".over")?.remove();
    if (overlay) {
      const over = image(screens[place].given[0], "");
      over.className = "over";
      one.append(over);
    }
  }
  actions(screens[place]);
  if (study.form === "rankings") number();
}

function pick(one) {
  if (!ready || busy || one >= screens[place].pictures.length) return;
  if (study.form === "pairs") { answer(one === 0 ? [1, 2] : [2, 1]); return; }
  const count = screens[place].pictures.length;
  if (picked.length === count) picked = []; // ranked already: begin anew
  if (picked.includes(one)) picked = picked.filter((other) => other !== one);
  else picked.push(one);
  if (picked.length === count - 1) picked.push([...Array(count).keys()].find((other) => !picked.includes(other)));
  number();
}

function ranksOf(picks) {
  const ranks = [];
  picks.forEach((one, at) => { ranks[one] = at + 1; });
  return ranks;
}

function finish() {
  if (picked.length === screens[place].pictures.length) answer(ranksOf(picked));
}

function number() {
  const ranks = ranksOf(picked);
  document.querySelectorAll(".picture").forEach((one, at) => {
    one.classList.toggle("chosen", ranks[at] !== undefined);
    one.querySelector(".badge").textContent = ranks[at] ?? LETTERS[at];
  });
  if (get("finish")) get("finish").disabled = picked.length < screens[place].pictures.length;
}

function mark(ranks) {
  if (study.form === "rankings") { picked = order(ranks); number(); return; }
  const equal = ranks.every((one) => one === 1);
  document.querySelectorAll(".picture").forEach((one, at) => one.classList.toggle("chosen", !equal && ranks[at] === 1));
  get("actions").firstChild?.setAttribute("aria-pressed", String(equal));
}

function back() {
  if (busy || place <= 0) return;
  place = Math.min(place, screens.length);
  const to = place - 1;
  place = null; // no card between questions on the way back
  go(to);
}

function onward() {
  if (busy || place >= screens.length) return;
  go(place + 1 < screens.length && screens[place + 1].answer ? place + 1 : next(place));
}

// ---- one picture, large

function zoom(number) {
  large = number;
  if (!get("zoom").open) { get("zoom").showModal(); get("close").focus(); }
  enlarge();
}

function enlarge() {
  const screen = screens[place], all = [...screen.pictures, ...screen.given];
  large = (large + all.length) % all.length;
  get("large").src = address(all[large]);
  get("large").classList.toggle("pixels", true);
  get("which").textContent = large < screen.pictures.length ? `Picture ${LETTERS[large]}`
    : screen.photographs ? "Photograph" : "Guide";
}

function nearer(event) {
  const view = get("view"), box = get("large").getBoundingClientRect();
  const x = event ? (event.clientX - box.left) / box.width : 0.5, y = event ? (event.clientY - box.top) / box.height : 0.5;
  const near = view.classList.toggle("near");
  get("nearer").textContent = near ? "Zoom out" : "Zoom in";
  if (near) view.scrollTo(x * view.scrollWidth - view.clientWidth / 2, y * view.scrollHeight - view.clientHeight / 2);
}

// ---- keys

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.length === 1 ? event.key.toUpperCase() : event.key;
  if (get("zoom").open) {
    if (key === "ArrowLeft") { large -= 1; enlarge(); }
    if (key === "ArrowRight") { large += 1; enlarge(); }
    if (key === "+" || key === "-" || key === "Z") nearer();
    return;
  }
  if (key === "Backspace") { event.preventDefault(); if (get("ask").hidden || !unpick()) back(); return; }
  if (get("ask").hidden) return;
  const letter = LETTERS.indexOf(key), digit = "12345678".indexOf(key);
  if (key === "0" || key === "=") tie();
  else if (key === "T") toggle();
  else if (key === "Z") zoom(0);
  else if (key === "Enter" && event.target === document.body) finish();
  else if (digit >= 0) pick(digit);
  else if (letter >= 0) pick(letter);
  else if (study.form === "pairs" && (key === "ArrowLeft" || key === "ArrowUp")) pick(0);
  else if (study.form === "pairs" && (key === "ArrowRight" || key === "ArrowDown")) pick(1);
}

function unpick() {
  if (study.form !== "rankings" || !picked.length || screens[place].answer) return false;
  picked.pop();
  number();
  return true;
}

// ---- the beginning

function fail(reason, again) {
  get("reason").textContent = reason;
  get("retry").onclick = again;
  show("trouble");
}

function intro() {
  const left = screens.filter((one) => !one.answer).length;
  if (!left) { go(screens.length); return; }
  const keys = !matchMedia("(pointer: coarse)").matches; // which a telephone is said to be
  const rankings = study.form === "rankings", minutes = Math.ceil(left * (rankings ? 5 * screens[0].pictures.length : 6) / 60);
  document.title = study.title;
  get("title").textContent = study.title;
  get("told").textContent = left < screens.length
    ? `Welcome back. ${left} of ${screens.length} screens are left, about ${minutes} minute${minutes === 1 ? "" : "s"}.`
    : `${screens.length} screens, about ${minutes} minute${minutes === 1 ? "" : "s"}. There is no wrong answer: say what you see.`;
  const how = rankings
    ? ["Tap the pictures from the best to the worst" + (keys ? ", or press their letters in that order" : "") + "; then Next."]
    : ["Tap the picture that you choose" + (keys ? ", or press A or B." : ".")];
  if (study.ties) how.push("If you cannot tell: No difference" + (keys ? ", or 0." : "."));
  how.push(`The magnifier${keys ? ", or Z," : ""} enlarges a picture; there ‹ and › change between the pictures.`);
  if (screens.some((one) => one.overlay))
    how.push(`Guide on top${keys ? ", or T," : ""} lays the guide picture over the others.`);
  how.push(`Back${keys ? ", or Backspace," : ""} returns to your last answer, which you may change.`);
  get("how").replaceChildren(...how.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  get("start").textContent = left < screens.length ? "Go on" : "Start";
  show("intro");
  progress();
  get("start").focus();
}

async function begin() {
  let response;
  try {
    response = await fetch(`/study?rater=${encodeURIComponent(rater)}`);
    if (!response.ok) throw new Error((await response.json()).error);
    study = await response.json();
  } catch (error) {
    fail(response ? error.message : "The server cannot be reached.", begin);
    return;
  }
  screens = study.screens;
  store = `study ${study.study} ${rater}`;
  try { waiting = JSON.parse(localStorage.getItem(store)) ?? []; } catch { waiting = []; }
  for (const one of waiting) {
    const screen = screens.find((other) => other.trial === one.trial);
    if (screen) screen.answer = { id: one.id, ranks: one.ranks };
  }
  place = null;
  overlay = false;
  keep();
  send();
  intro();
}

get("start").addEventListener("click", () => { place = null; go(next(-1)); });
get("go").addEventListener("click", () => draw());
get("back").addEventListener("click", back);
get("on").addEventListener("click", onward);
get("close").addEventListener("click", () => get("zoom").close());
get("before").addEventListener("click", () => { large -= 1; enlarge(); });
get("after").addEventListener("click", () => { large += 1; enlarge(); });
get("nearer").addEventListener("click", () => nearer());
get("large").addEventListener("click", nearer);
addEventListener("keydown", pressed);
addEventListener("resize", layout);
addEventListener("beforeunload", (event) => { if (waiting?.length) event.preventDefault(); });
begin();
