// The panel beside the conversation: speed, queue, cache, the plan, and what a layer attends to.

import { get } from "./api.js";

const POLL_MS = 1000;
const SPARK_POINTS = 60;
const byId = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en-GB");
const rates = [];

/** Start to show what the server does; calls back with the state and the model's name. */
export function start(onState) {
  let failures = 0;
  const poll = async () => {
    if (!document.hidden) {
      try {
        const status = await get("/v1/dseek/status");
        failures = 0;
        show(status);
        onState(status.error ? "down" : !status.ready ? "starting" : status.running ? "busy" : "ready", status.model);
      } catch {
        failures += 1;
        onState("down", null);
      }
    }
    setTimeout(poll, Math.min(POLL_MS * 2 ** Math.min(failures, 4), 15000));
  };
  poll();
  loadPlan();
  byId("layer").addEventListener("input", loadAttention);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

/** Draw again, after the colours have changed. */
export function redraw() {
  drawSpark();
  drawAttention();
}

/** Show how the last answer went. */
export function showAnswer({ firstTokenMs, tokensPerSecond, promptTokens, answerTokens }) {
  pairs(byId("last-answer"), [
    ["First token", firstTokenMs === null ? "–" : `${number.format(Math.round(firstTokenMs))} ms`],
    ["This answer", tokensPerSecond === null ? "–" : `${tokensPerSecond.toFixed(1)} tokens/s`],
    ["Prompt, answer", `${number.format(promptTokens)}, ${number.format(answerTokens)} tokens`],
  ]);
}

function show(status) {
  rates.push(status.tokens_s);
  if (rates.length > SPARK_POINTS) rates.shift();
  byId("rate").textContent = status.tokens_s >= 100 ? number.format(Math.round(status.tokens_s)) : status.tokens_s.toFixed(1);
  drawSpark();
  pairs(byId("queue"), [
    ["Answering", number.format(status.running)],
    ["Waiting", number.format(status.waiting)],
    ["Steps", number.format(status.steps)],
    ["Prompt tokens saved", number.format(status.saved_tokens)],
  ]);
  const used = status.num_pages - status.free_pages;
  const kept = Math.min(status.cached_pages, status.free_pages);
  const share = (pages) => (status.num_pages ? (100 * pages) / status.num_pages : 0);
  byId("cache-used").style.width = `${share(used)}%`;
  byId("cache-kept").style.width = `${share(kept)}%`;
  byId("cache-meter").setAttribute("aria-valuenow", String(Math.round(share(used))));
  byId("cache-words").textContent = `Cache: ${number.format(used)} of ${number.format(status.num_pages)} pages in use, ${number.format(kept)} kept for reuse`;
}

async function loadPlan() {
  try {
    const plan = await get("/v1/dseek/plan");
    byId("plan-summary").textContent = plan.summary;
    byId("welcome-plan").textContent = `${plan.summary} Nothing leaves this server.`;
    pairs(byId("plan-facts"), plan.facts.map((fact) => [fact.name, fact.value]));
    const items = plan.choices.map((choice) => {
      const item = document.createElement("li");
      const head = document.createElement("b");
      head.textContent = `${choice.name}: ${choice.chosen}`;
      item.append(head, choice.why);
      return item;
    });
    byId("plan-choices").replaceChildren(...items);
    byId("layer").max = String(plan.num_layers - 1);
    await loadAttention();
  } catch {
    byId("plan-summary").textContent = "The plan cannot be shown.";
  }
}

let picture = null;
let asked = 0;

async function loadAttention() {
  const layer = byId("layer").value;
  byId("layer-shown").textContent = layer;
  const mine = (asked += 1);
  try {
    const found = await get(`/v1/dseek/attention?layer=${layer}&blocks=32`);
    if (mine !== asked) return;
    picture = found;
    byId("attention-words").textContent = `Layer ${found.layer}: ${found.words}. A square is ${found.block_tokens} × ${found.block_tokens} tokens; rows ask, columns are seen.`;
    const present = new Set(found.rows.join(""));
    const items = found.legend.flatMap((name, place) => {
      if (!present.has(String(place)) || place === 0) return [];
      const item = document.createElement("li");
      const swatch = document.createElement("span");
      swatch.className = `swatch p${place}`;
      item.append(swatch, name);
      return [item];
    });
    byId("legend").replaceChildren(...items);
    drawAttention();
  } catch {
    byId("attention-words").textContent = "The picture cannot be shown.";
  }
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function drawAttention() {
  if (!picture) return;
  const canvas = byId("attention");
  const size = picture.rows.length;
  const scale = Math.max(1, Math.floor((288 * Math.min(devicePixelRatio, 2)) / size));
  canvas.width = canvas.height = size * scale;
  const pen = canvas.getContext("2d");
  const colours = [null, colour("--left-out"), colour("--selectable"), colour("--seen")];
  picture.rows.forEach((row, y) => {
    [...row].forEach((place, x) => {
      if (place === "0") return;
      pen.fillStyle = colours[Number(place)];
      pen.fillRect(x * scale, y * scale, scale - 1, scale - 1);
    });
  });
}

function drawSpark() {
  const canvas = byId("spark");
  const ratio = Math.min(devicePixelRatio, 2);
  const width = (canvas.clientWidth || 288) * ratio;
  const height = (canvas.clientHeight || 56) * ratio;
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext("2d");
  const top = Math.max(1, ...rates) * 1.1;
  const at = (index) => [
    width - ((rates.length - 1 - index) * width) / (SPARK_POINTS - 1),
    height - ratio - (rates[index] / top) * (height - 4 * ratio),
  ];
  pen.lineWidth = 2 * ratio;
  pen.lineJoin = "round";
  pen.strokeStyle = colour("--line");
  pen.beginPath();
  pen.moveTo(0, height - ratio);
  pen.lineTo(width, height - ratio);
  pen.stroke();
  if (rates.length < 2) return;
  pen.strokeStyle = colour("--accent");
  pen.beginPath();
  rates.forEach((_, index) => pen.lineTo(...at(index)));
  pen.stroke();
  pen.lineTo(width, height);
  pen.lineTo(at(0)[0], height);
  pen.globalAlpha = 0.12;
  pen.fillStyle = colour("--accent");
  pen.fill();
}

function pairs(list, entries) {
  const nodes = entries.flatMap(([name, value]) => {
    const term = document.createElement("dt");
    term.textContent = name;
    const data = document.createElement("dd");
    data.textContent = value;
    return [term, data];
  });
  list.replaceChildren(...nodes);
}
