// Parameters of an answer, the theme, and the conversation: kept in this browser only.

const SETTINGS = "dseek-settings";
const MESSAGES = "dseek-messages";
const THEME = "dseek-theme";
const DEFAULTS = { system: "", temperature: 0.7, topP: 0.95, maxTokens: 512, seed: "" };
const byId = (id) => document.getElementById(id);
const FIELDS = { system: "system", temperature: "temperature", topP: "top-p", maxTokens: "max-tokens", seed: "seed" };

let values = { ...DEFAULTS, ...read(SETTINGS, {}) };

/** Connect the fields. */
export function startSettings() {
  for (const [name, id] of Object.entries(FIELDS)) {
    byId(id).addEventListener("input", () => {
      values[name] = byId(id).value;
      write(SETTINGS, values);
      showOutputs();
    });
  }
  byId("reset").addEventListener("click", () => {
    values = { ...DEFAULTS };
    write(SETTINGS, values);
    fill();
  });
  fill();
}

/** The parameters as fields of a request, and the instructions. */
export function parameters() {
  const body = { temperature: clamp(values.temperature, 0, 2, 0.7), top_p: clamp(values.topP, 0.05, 1, 1) };
  body.max_tokens = Math.round(clamp(values.maxTokens, 1, 1000000, 512));
  if (String(values.seed).trim() !== "") body.seed = Math.round(clamp(values.seed, 0, Number.MAX_SAFE_INTEGER, 0));
  return { body, system: String(values.system).trim() };
}

/** Messages of the last visit. */
export function readMessages() {
  const found = read(MESSAGES, []);
  return Array.isArray(found) ? found.filter((message) => typeof message?.content === "string" && ["user", "assistant"].includes(message.role)) : [];
}

/** Keep the messages. */
export function keepMessages(messages) {
  write(MESSAGES, messages.map(({ role, content, note, error }) => ({ role, content, note, error })));
}

/** Connect the theme's button; calls back when the colours change. */
export function startTheme(onChange) {
  const names = { auto: "as the system", light: "light", dark: "dark" };
  let theme = read(THEME, "auto");
  const apply = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").setAttribute("aria-label", `Theme: ${names[theme]}`);
    byId("theme").title = `Theme: ${names[theme]}`;
  };
  if (!(theme in names)) theme = "auto";
  apply();
  byId("theme").addEventListener("click", () => {
    theme = { auto: "light", light: "dark", dark: "auto" }[theme];
    write(THEME, theme);
    apply();
    onChange();
  });
}

function fill() {
  for (const [name, id] of Object.entries(FIELDS)) byId(id).value = String(values[name]);
  showOutputs();
}

function showOutputs() {
  byId("temperature-shown").textContent = Number(values.temperature).toFixed(2);
  byId("top-p-shown").textContent = Number(values.topP).toFixed(2);
}

function clamp(value, least, most, otherwise) {
  const found = Number(value);
  return Number.isFinite(found) && String(value).trim() !== "" ? Math.min(Math.max(found, least), most) : otherwise;
}

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // Storage is full or forbidden: the page works, and forgets.
  }
}
