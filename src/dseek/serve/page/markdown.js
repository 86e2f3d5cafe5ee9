// Markdown, the light part of it, as DOM nodes: what a model writes becomes text nodes and nothing else, so no answer can
// bring markup, scripts or requests of its own. Links are opened only on a click, and only to http and https.

const FENCE = /^ {0,3}(```+|~~~+)\s*([^`]*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const BULLET = /^(\s*)[-*+]\s+(.*)$/;
const NUMBER = /^(\s*)(\d{1,9})[.)]\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*([^\s*](?:[\s\S]*?[^\s*])?)\*\*|(?<![\w*])\*([^\s*](?:[^*\n]*?[^\s*])?)\*(?![\w*])|\[([^\]\n]{1,500})\]\((https?:\/\/[^\s)]{1,2000})\)|(https?:\/\/[^\s<>"')\]]{1,2000})/;
const MAX_DEPTH = 6;

/** Make nodes of a whole text. */
export function render(text) {
  const fragment = document.createDocumentFragment();
  blocks(text.split("\n"), fragment, 0);
  return fragment;
}

/** Renders a text that grows: finished blocks stay as they are, only the last one is made again. */
export class GrowingText {
  constructor(holder) {
    this.holder = holder;
    this.text = "";
    this.done = 0;
    this.numDone = 0;
  }

  /** Add a piece. */
  push(piece) {
    this.text += piece;
    const end = lastBoundary(this.text, this.done);
    while (this.holder.childNodes.length > this.numDone) this.holder.lastChild.remove();
    if (end > this.done) {
      this.holder.append(render(this.text.slice(this.done, end)));
      this.done = end;
      this.numDone = this.holder.childNodes.length;
    }
    this.holder.append(render(this.text.slice(this.done)));
  }
}

// The end of the last block that cannot change any more: an empty line outside of code, before which no list is open.
function lastBoundary(text, from) {
  let fence = null;
  let end = from;
  let position = from;
  let inList = false;
  for (const line of text.slice(from).split("\n")) {
    const next = position + line.length + 1;
    const mark = FENCE.exec(line);
    if (fence) {
      if (mark && mark[1].startsWith(fence) && !mark[2].trim()) fence = null;
    } else if (mark) {
      fence = mark[1];
      inList = false;
    } else if (line.trim()) {
      inList = BULLET.test(line) || NUMBER.test(line) || (inList && /^\s/.test(line));
    } else if (!inList && next <= text.length) {
      end = next;
    }
    position = next;
  }
  return end;
}

function blocks(lines, parent, depth) {
  let index = 0;
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) {
      const element = document.createElement("p");
      inline(paragraph.join("\n"), element, 0);
      parent.append(element);
      paragraph = [];
    }
  };
  while (index < lines.length) {
    const line = lines[index];
    let match;
    if ((match = FENCE.exec(line))) {
      flush();
      const body = [];
      for (index += 1; index < lines.length; index += 1) {
        const close = FENCE.exec(lines[index]);
        if (close && close[1].startsWith(match[1]) && !close[2].trim()) break;
        body.push(lines[index]);
      }
      parent.append(codeBlock(body.join("\n"), match[2].trim()));
      index += 1;
    } else if ((match = HEADING.exec(line))) {
      flush();
      const element = document.createElement(`h${Math.min(match[1].length + 2, 5)}`);
      inline(match[2].replace(/\s+#+\s*$/, ""), element, 0);
      parent.append(element);
      index += 1;
    } else if (RULE.test(line)) {
      flush();
      parent.append(document.createElement("hr"));
      index += 1;
    } else if (depth < MAX_DEPTH && QUOTE.test(line)) {
      flush();
      const inner = [];
      while (index < lines.length && (match = QUOTE.exec(lines[index]))) {
        inner.push(match[1]);
        index += 1;
      }
      const element = document.createElement("blockquote");
      blocks(inner, element, depth + 1);
      parent.append(element);
    } else if (depth < MAX_DEPTH && (BULLET.test(line) || NUMBER.test(line))) {
      flush();
      index = list(lines, index, parent, depth);
    } else if (line.includes("|") && index + 1 < lines.length && /^\s*\|?(\s*:?-{3,}:?\s*\|)+(\s*:?-{3,}:?\s*)?$/.test(lines[index + 1])) {
      flush();
      index = table(lines, index, parent);
    } else if (!line.trim()) {
      flush();
      index += 1;
    } else {
      paragraph.push(line);
      index += 1;
    }
  }
  flush();
}

function list(lines, start, parent, depth) {
  const numbered = NUMBER.test(lines[start]);
  const kind = numbered ? NUMBER : BULLET;
  const indent = kind.exec(lines[start])[1].length;
  const element = document.createElement(numbered ? "ol" : "ul");
  if (numbered) element.start = Number(kind.exec(lines[start])[2]);
  let index = start;
  let inner = null;
  const flush = () => {
    if (inner === null) return;
    const item = document.createElement("li");
    const holder = document.createElement("div");
    blocks(inner, holder, depth + 1);
    // A single paragraph needs no box of its own.
    if (holder.firstChild && holder.firstChild.nodeName === "P") holder.firstChild.replaceWith(...holder.firstChild.childNodes);
    item.append(...holder.childNodes);
    element.append(item);
    inner = null;
  };
  for (; index < lines.length; index += 1) {
    const line = lines[index];
    const match = kind.exec(line);
    if (match && match[1].length <= indent + 1) {
      if (match[1].length < indent) break;
      flush();
      inner = [match[match.length - 1]];
    } else if (!line.trim()) {
      const next = lines.slice(index + 1).find((other) => other.trim());
      if (next === undefined || !(kind.test(next) || /^\s{2,}/.test(next))) break;
      inner.push("");
    } else if (/^\s{2,}/.test(line) || !(BULLET.test(line) || NUMBER.test(line) || HEADING.test(line) || FENCE.test(line))) {
      inner.push(line.replace(/^\s{1,4}/, ""));
    } else break;
  }
  flush();
  parent.append(element);
  return index;
}

function table(lines, start, parent) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const holder = document.createElement("div");
  holder.className = "table";
  holder.tabIndex = 0;
  const made = document.createElement("table");
  let index = start;
  for (; index < lines.length && lines[index].includes("|"); index += 1) {
    if (index === start + 1) continue;
    const row = made.insertRow();
    for (const cell of cells(lines[index])) {
      const element = document.createElement(index === start ? "th" : "td");
      inline(cell, element, 0);
      row.append(element);
    }
  }
  holder.append(made);
  parent.append(holder);
  return index;
}

function codeBlock(text, language) {
  const block = document.createElement("div");
  block.className = "block";
  const head = document.createElement("header");
  const name = document.createElement("span");
  name.textContent = language.split(/\s/)[0].slice(0, 40) || "text";
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "quiet";
  copy.dataset.copy = "code";
  copy.textContent = "Copy";
  head.append(name, copy);
  const pre = document.createElement("pre");
  pre.tabIndex = 0;
  const code = document.createElement("code");
  code.textContent = text;
  pre.append(code);
  block.append(head, pre);
  return block;
}

function inline(text, parent, depth) {
  let rest = text;
  while (rest) {
    const match = depth < MAX_DEPTH ? INLINE.exec(rest) : null;
    if (!match) break;
    parent.append(rest.slice(0, match.index));
    const [whole, ticks, code, strong, emphasis, label, target, bare] = match;
    if (ticks) parent.append(wrapped("code", code.trim() || code, null));
    else if (strong) parent.append(wrapped("strong", strong, depth + 1));
    else if (emphasis) parent.append(wrapped("em", emphasis, depth + 1));
    else parent.append(link(label ?? bare, target ?? bare));
    rest = rest.slice(match.index + whole.length);
  }
  parent.append(rest);
}

function wrapped(name, text, depth) {
  const element = document.createElement(name);
  if (depth === null) element.textContent = text;
  else inline(text, element, depth);
  return element;
}

function link(label, target) {
  const element = document.createElement("a");
  element.href = target;
  element.rel = "noopener noreferrer nofollow";
  element.target = "_blank";
  element.textContent = label;
  return element;
}
