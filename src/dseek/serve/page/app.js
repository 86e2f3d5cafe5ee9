// The conversation: send, stream, stop, regenerate, edit, copy.

import { chat, onKeyNeeded } from "./api.js";
import { fillIcons, icon } from "./icons.js";
import { GrowingText, render } from "./markdown.js";
import { redraw, showAnswer, start as startPanel } from "./panel.js";
import { keepMessages, parameters, readMessages, startSettings, startTheme } from "./settings.js";

const byId = (id) => document.getElementById(id);
const IDEAS = ["Explain how a bicycle stays upright, in three sentences.", "Write a Python function that checks whether a year is a leap year.", "Give me a list of five questions for a job interview."];
const STATES = { ready: "ready", busy: "answering", starting: "warming up", down: "not reachable" };

const messages = readMessages();
let running = null; // the AbortController of the answer that streams

function showAll() {
  byId("welcome").hidden = messages.length > 0;
  byId("messages").replaceChildren(...messages.map((message, index) => element(message, index)));
}

function element(message, index) {
  const item = document.createElement("li");
  item.className = `message ${message.role}`;
  const who = document.createElement("span");
  who.className = "unseen";
  who.textContent = message.role === "user" ? "You:" : "Answer:";
  const body = document.createElement("div");
  body.className = "body";
  if (message.role === "user") body.textContent = message.content;
  else body.append(render(message.content));
  item.append(who, body);
  if (message.error) item.append(failure(message.error));
  item.append(actions(message, index));
  return item;
}

function failure(text) {
  const box = document.createElement("p");
  box.className = "failed";
  box.setAttribute("role", "alert");
  box.textContent = text;
  return box;
}

function actions(message, index) {
  const bar = document.createElement("div");
  bar.className = "actions";
  const add = (name, label, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet";
    button.append(icon(name), label);
    button.addEventListener("click", () => act(button));
    bar.append(button);
  };
  if (message.content) add("copy", "Copy", (button) => copy(message.content, button));
  if (message.role === "user") add("edit", "Edit", () => edit(index));
  else if (index === messages.length - 1) add("again", message.error ? "Try again" : "Regenerate", () => regenerate());
  if (message.note) {
    const note = document.createElement("span");
    note.className = "note";
    note.textContent = message.note;
    bar.append(note);
  }
  return bar;
}

async function copy(text, button) {
  const before = [...button.childNodes];
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.replaceChildren(icon("done"), "Copied");
  announce("Copied");
  setTimeout(() => button.replaceChildren(...before), 1500);
}

function edit(index) {
  if (running) return;
  const item = byId("messages").children[index];
  const form = document.createElement("form");
  form.className = "edit";
  const label = document.createElement("label");
  label.className = "unseen";
  label.textContent = "Edit the message";
  const area = document.createElement("textarea");
  area.value = messages[index].content;
  area.id = "edit-area";
  label.htmlFor = area.id;
  const row = document.createElement("div");
  row.className = "row";
  const cancel = document.createElement("button");
  cancel.type = "button";
  cancel.className = "quiet";
  cancel.textContent = "Cancel";
  const save = document.createElement("button");
  save.type = "submit";
  save.className = "primary";
  save.textContent = "Send";
  row.append(cancel, save);
  form.append(label, area, row);
  cancel.addEventListener("click", () => item.replaceWith(element(messages[index], index)));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = area.value.trim();
    if (!text) return;
    messages.splice(index);
    send(text);
  });
  item.replaceChildren(form);
  area.focus();
}

function regenerate() {
  if (running) return;
  while (messages.length && messages.at(-1).role === "assistant") messages.pop();
  if (messages.length) answer();
}

function send(text) {
  messages.push({ role: "user", content: text });
  answer();
}

async function answer() {
  const { body, system } = parameters();
  const sent = messages.filter((message) => message.content).map(({ role, content }) => ({ role, content }));
  if (system) sent.unshift({ role: "system", content: system });
  const message = { role: "assistant", content: "" };
  messages.push(message);
  keepMessages(messages);
  showAll();
  const item = byId("messages").lastElementChild;
  item.classList.add("streaming");
  item.setAttribute("aria-busy", "true");
  item.querySelector(".actions").replaceChildren();
  const growing = new GrowingText(item.querySelector(".body"));
  setRunning(new AbortController());
  scrollDown(true);

  const began = performance.now();
  let first = null;
  let last = began;
  let usage = null;
  let reason = null;
  let waiting = "";
  let frame = 0;
  const flush = () => {
    frame = 0;
    const following = atBottom();
    growing.push(waiting);
    waiting = "";
    if (following) scrollDown(false);
  };
  try {
    for await (const chunk of chat({ ...body, messages: sent }, running.signal)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const piece = choice.delta.content ?? "";
      if (piece) {
        last = performance.now();
        first ??= last;
        message.content += piece;
        waiting += piece;
        frame ||= requestAnimationFrame(flush);
      }
    }
    if (reason === "length") message.note = "cut at the longest answer";
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else message.error = error.message;
  }
  cancelAnimationFrame(frame);
  const seconds = (last - (first ?? last)) / 1000;
  if (usage) {
    const speed = seconds > 0 && usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / seconds : null;
    showAnswer({ firstTokenMs: first === null ? null : first - began, tokensPerSecond: speed, promptTokens: usage.prompt_tokens, answerTokens: usage.completion_tokens });
    const shown = [message.note, `${usage.completion_tokens} tokens`, speed === null ? null : `${speed.toFixed(1)} tokens/s`];
    message.note = shown.filter(Boolean).join(" · ");
  }
  setRunning(null);
  keepMessages(messages);
  const following = atBottom();
  const index = messages.indexOf(message);
  if (index >= 0) item.replaceWith(element(message, index));
  if (following) scrollDown(false);
  announce(message.error ? "The answer failed." : message.note === "stopped" ? "The answer was stopped." : "The answer is complete.");
}

function setRunning(controller) {
  running = controller;
  const hadFocus = [byId("stop"), byId("send"), document.body].includes(document.activeElement);
  byId("stop").hidden = controller === null;
  byId("send").hidden = controller !== null;
  if (hadFocus || controller === null) (matchMedia("(pointer: coarse)").matches ? byId("scroll") : byId("input")).focus({ preventScroll: true });
  showSendable();
}

function showSendable() {
  byId("send").disabled = byId("input").value.trim() === "";
}

function atBottom() {
  const box = byId("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

function scrollDown(always) {
  const box = byId("scroll");
  if (always || atBottom() || box.scrollTop > 0) box.scrollTop = box.scrollHeight;
}

function announce(text) {
  byId("announce").textContent = "";
  requestAnimationFrame(() => (byId("announce").textContent = text));
}

function grow() {
  const area = byId("input");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, 192)}px`;
}

function setPanel(open) {
  byId("columns").classList.toggle("without-panel", !open);
  byId("panel-toggle").setAttribute("aria-expanded", String(open));
  if (open) redraw();
}

function askForKey() {
  const dialog = byId("key-dialog");
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(byId("key").value.trim() || null);
      byId("key").value = "";
    }, { once: true });
    if (!dialog.open) dialog.showModal();
  });
}

function startPage() {
  fillIcons(document);
  startSettings();
  startTheme(redraw);
  let asking = null;
  onKeyNeeded(() => (asking ??= askForKey().finally(() => (asking = null))));

  byId("ideas").replaceChildren(...IDEAS.map((text) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => send(text));
    item.append(button);
    return item;
  }));
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = byId("input").value.trim();
    if (!text || running) return;
    byId("input").value = "";
    grow();
    send(text);
  });
  byId("input").addEventListener("input", () => {
    grow();
    showSendable();
  });
  byId("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("composer").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (running) running.abort();
    else if (narrow.matches) setPanel(false);
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new-chat").addEventListener("click", () => {
    running?.abort();
    messages.length = 0;
    keepMessages(messages);
    showAll();
    byId("input").focus();
  });
  byId("scroll").addEventListener("scroll", () => (byId("jump").hidden = atBottom()));
  byId("jump").addEventListener("click", () => scrollDown(true));
  byId("messages").addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy=code]");
    if (button) copy(button.closest(".block").querySelector("code").textContent, button);
  });
  const narrow = matchMedia("(max-width: 60rem)");
  byId("panel-toggle").addEventListener("click", () => setPanel(byId("columns").classList.contains("without-panel")));
  byId("panel-close").addEventListener("click", () => {
    setPanel(false);
    byId("panel-toggle").focus();
  });
  narrow.addEventListener("change", () => setPanel(!narrow.matches));
  setPanel(!narrow.matches);
  startPanel((state, model) => {
    byId("state").dataset.state = state;
    if (byId("state-text").textContent !== STATES[state]) byId("state-text").textContent = STATES[state];
    if (model) {
      byId("model").textContent = model.split("/").at(-1);
      byId("model").title = model;
    }
  });
  showAll();
  scrollDown(true);
  showSendable();
  byId("input").focus({ preventScroll: true });
}

startPage();
